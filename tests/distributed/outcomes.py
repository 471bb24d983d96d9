"""What runs left behind, for comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


def checkpoint(run: str | Path, step: int | None = None) -> Path:
    """The newest checkpoint of a version, or that of a step."""
    found = sorted(Path(run).glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return found[-1] if step is None else next(path for path in found if path.name.endswith(f"-{step}"))


def weights(run: str | Path, step: int | None = None) -> dict[str, Tensor]:
    folder = checkpoint(run, step)
    if (folder / "adapter.safetensors").exists():
        return load_file(folder / "adapter.safetensors")
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def metrics(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run: str | Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def furthest(first: dict[str, Tensor], second: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest difference of a weight, as a share of the largest movement of a weight since `start`."""
    assert first.keys() == second.keys() == start.keys()
    moved = max(float((first[name] - start[name]).abs().max()) for name in first)
    assert moved > 0
    return max(float((first[name] - second[name]).abs().max()) for name in first) / moved
