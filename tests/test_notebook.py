"""The notebook's cells, in order, with fewer steps; lines for the shell go to the commands they name."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen_image_finetune.command.arguments import build_parser
from qwen_image_finetune.command.cli import VERBS, main, parse

NOTEBOOK = Path(__file__).parent.parent / "notebooks/first_lora.ipynb"
FEWER = {"train.max_train_steps=400": "train.max_train_steps=2 cache.num_variations=1", "--steps 8": "--steps 1",
         '"num_inference_steps": 8': '"num_inference_steps": 1'}  # fmt: skip


def leave_few(data: Path) -> None:
    """Two pairs of each data set: what a cell does is to be seen, not what it learns."""
    for file in data.rglob("*"):
        if file.is_file() and not file.stem.startswith(("face_00", "face_01")):
            file.unlink()


def test_the_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown: list[Any] = []
    names: dict[str, Any] = {"display": shown.append, "__name__": "__notebook__"}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    for cell in cells:
        text = "".join(cell["source"])
        for words, fewer in FEWER.items():
            text = text.replace(words, fewer)
        if not text.startswith(("!", "%")):
            exec(compile(text, cell["id"], "exec"), names)
            continue
        for command in text.splitlines():
            if command.startswith("!qif "):
                words = shlex.split(command)[1:]
                if "not-run-in-tests" in cell["metadata"].get("tags", []):
                    parse(build_parser(VERBS), words)
                else:
                    assert main(words) == 0, command
                    leave_few(Path("data"))
            else:
                assert command.startswith("%pip install ")
    assert len(shown) == 2 and all(isinstance(picture, Image.Image) for picture in shown)
