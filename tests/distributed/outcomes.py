"""What runs left behind, for comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_image_finetune.training.trained import exact


def checkpoint(run: str | Path, step: int | None = None) -> Path:
    """The newest checkpoint of a version, or that of a step."""
    found = sorted(Path(run).glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return found[-1] if step is None else next(path for path in found if path.name.endswith(f"-{step}"))


def weights(run: str | Path, step: int | None = None) -> dict[str, Tensor]:
    folder = checkpoint(run, step)
    return exact(folder)


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of the steps; those of validation have no loss."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(run: str | Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def furthest(first: dict[str, Tensor], second: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest difference of a weight, as a share of the largest movement of a weight since `start`."""
    assert first.keys() == second.keys() == start.keys()
    moved = max(float((first[name] - start[name]).abs().max()) for name in first)
    assert moved > 0
    return max(float((first[name] - second[name]).abs().max()) for name in first) / moved


# Notes in a weights file that runs of the same learning differ in: when, in which project, in how many processes.
ABOUT_THE_RUN = (
    "modelspec.date", "modelspec.title", "ss_output_name", "ss_gradient_accumulation_steps", "qif.config_sha256",
)  # fmt: skip


def files(folder: Path) -> dict[str, tuple[object, bytes]]:
    """(header, tensors) of the files for users in a checkpoint. The order of a header's entries is left to chance."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        if path.name == "pytorch_lora_weights.safetensors" or path.parent.name == "transformer":
            found[str(path.relative_to(folder))] = _content(path)
    assert found
    for path in folder.glob("transformer/config.json"):
        found["config"] = (json.loads(path.read_text()), b"")
    return found


def state_files(folder: Path) -> dict[str, tuple[object, bytes]]:
    """The same of everything in a checkpoint that a resume reads."""
    found = {name: (json.loads((folder / f"{name}.json").read_text()), b"") for name in ("schedule", "progress")}
    assert (folder / "optimizer.safetensors").is_file()
    for path in folder.glob("*.safetensors"):
        found[path.name] = _content(path)
    return {**found, "optimizer": (json.loads((folder / "optimizer.json").read_text()), b"")}


def _content(path: Path) -> tuple[object, bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for name in ABOUT_THE_RUN:
        header.get("__metadata__", {}).pop(name, None)
    return header, data[end:]
