"""Draws the pictures of a grid, one after the other, with one model in memory: only the LoRA changes between them.

A process of its own: `python -m qwen_image_finetune.studio.grid CONFIGURATION FOLDER WISH`, WISH being JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image_finetune.config import load_config
from qwen_image_finetune.machine import console
from qwen_image_finetune.machine.signals import StopSignals


@dataclass(frozen=True)
class Wish:
    """What is drawn in every cell, and with what: (LoRA, strength), or None for the base."""

    prompt: str
    images: list[str]
    seed: int
    steps: int | None
    cells: list[tuple[str, float] | None]


def draw_cells(config: Path, folder: Path, wish: Wish) -> None:
    """Write FOLDER/0.png, 1.png, ...; each appears when it is drawn."""
    from qwen_image_finetune.drawing.draw import Request, draw
    from qwen_image_finetune.drawing.tuned import TunedPredictor

    loaded = load_config(config)
    drawer = TunedPredictor(loaded)
    for place, cell in enumerate(wish.cells):
        request = Request(
            wish.prompt,
            tuple(map(Path, wish.images)),
            output=folder / f"{place}.png",
            seed=wish.seed,
            steps=wish.steps,
            loras=() if cell is None else (cell[0],),
            strengths=() if cell is None else (cell[1],),
        )
        draw(loaded, request, drawer)


def main() -> None:
    config, folder, text = sys.argv[1:]
    told: dict[str, Any] = json.loads(text)
    with StopSignals():
        try:
            draw_cells(Path(config), Path(folder), Wish(**told))
        except (ValueError, RuntimeError, OSError) as error:
            if not type(error).__module__.startswith("qwen_image_finetune"):
                raise
            console.refuse(str(error))
            sys.exit(2)


if __name__ == "__main__":
    main()
