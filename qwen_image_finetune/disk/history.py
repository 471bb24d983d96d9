"""What the files of a version say: its metrics, how it ended, which checkpoint is best, what it was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_image_finetune.disk.reading import MEBIBYTE, Unreadable, read_json, read_regular
from qwen_image_finetune.disk.versions import RunError, checkpoint_folders, step_of, superseded_folders

STATE, METRICS = "run.json", "metrics.jsonl"
LOG = "log.txt"  # every line that was said while the version was written
ENVIRONMENT = "environment.json"  # versions and device
DATA = "data.json"  # the content of its pairs
BEST = "best.json"  # which checkpoint is best on held-out pairs
LONGEST = 1024 * MEBIBYTE  # of metrics: millions of steps


def read_metrics(version: Path) -> list[dict[str, float]]:
    """Every whole line of a version's metrics.jsonl, whether or not its process still writes it.

    `step`, then the values; non-finite ones are floats again.

    Raises:
        RunError: a value is no number.
    """
    return [_numbers(line, version / METRICS) for line in lines(version / METRICS)]


def _numbers(line: Mapping[str, Any], path: Path) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in line.items()}
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError(
            f"{path} is damaged: a value of step {line['step']} is no number ({error}); remove that line"
        ) from error


def has_round(version: Path, step: int) -> bool:
    """Whether the validation after a step was finished: its line, without a training loss, is written last."""
    return any(line["step"] == step and "loss" not in line for line in lines(version / METRICS))


def read_best(version: Path) -> dict[str, Any] | None:
    """What best.json says: `step`, `checkpoint` (its name), maybe `losses`, and more; None where nothing was measured.

    Raises:
        RunError: it is not what was written there.
    """
    best = read_object(version / BEST)
    if best is None:
        return None
    step, losses = best.get("step"), best.get("losses", [])
    numbers = isinstance(losses, list) and all(isinstance(loss, int | float) for loss in losses)
    if not isinstance(step, int) or not isinstance(best.get("checkpoint"), str) or not numbers:
        raise RunError(f"{version / BEST} is damaged: its step, checkpoint or losses are none; {_way_out(BEST)}")
    return best


def best_checkpoint(version: Path) -> Path | None:
    """The checkpoint that best.json points to; None where no held-out pairs were measured.

    Raises:
        RunError: as `read_best`.
    """
    best = read_best(version)
    return None if best is None else version / str(best["checkpoint"])


def read_object(path: Path) -> dict[str, Any] | None:
    """What a JSON file of a version holds; None where it is missing.

    Raises:
        RunError: it cannot be read.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except Unreadable as error:
        raise RunError(f"{error}; {_way_out(path.name)}") from error


def _way_out(name: str) -> str:
    return f"put {name} back from a copy, or remove it"


def steps_of(version: Path) -> int:
    """Optimizer steps a version reached, by the largest of its records: state, metrics, names of checkpoints."""
    written = [*lines(version / STATE), *lines(version / METRICS)]
    folders = [*checkpoint_folders(version), *superseded_folders(version)]
    return max(0, *(int(line["step"]) for line in written), *(step_of(folder) for folder in folders), 0)


def state_of(version: Path) -> str | None:
    """The word in run.json; "unknown" where that is damaged, None where there is none."""
    if not (version / STATE).exists():
        return None
    found = lines(version / STATE)
    return str(found[0].get("state", "unknown")) if found else "unknown"


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file that have a step; a line torn by a power failure is passed over.

    Raises:
        RunError: the file is none that can be read.
    """
    try:
        text = read_regular(path, LONGEST).decode(errors="replace")
    except FileNotFoundError:
        return []
    except Unreadable as error:
        raise RunError(f"{error}; {_way_out(path.name)}") from error
    found = (_line(line) for line in text.splitlines())
    return [line for line in found if line is not None]


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and isinstance(line.get("step"), int) and not isinstance(line["step"], bool)
    return line if whole else None
