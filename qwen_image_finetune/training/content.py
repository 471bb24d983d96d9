"""What the pairs of a run are, by content: kept with it, so that a resume can say what changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_image_finetune.disk import history
from qwen_image_finetune.encoding.cache import EncodedDataset
from qwen_image_finetune.encoding.store import entry_key
from qwen_image_finetune.training.job import Job

CONTENT = "content"  # its hash in a checkpoint
NAMED = 3  # pairs, of each kind of change

Content = Mapping[str, Mapping[str, Sequence[str]]]  # part -> key of a pair -> hashes of its prompt and its pictures


def run_content(job: Job) -> Content:
    """What is trained on, and what is held out, pair by pair."""
    parts = {"training": job.rows, "held_out": job.held_out, "preserved": job.preserved}
    return {name: _of(rows) for name, rows in parts.items() if rows is not None}


def _of(rows: EncodedDataset) -> dict[str, Sequence[str]]:
    return {row.key: rows.content(index) for index, row in enumerate(rows.dataset.rows)}


def digest(content: Content) -> str:
    """A hash, 16 digits, of the pairs that are trained on, and of those of loss.preservation, in their order."""
    return entry_key(pairs=[[key, *found] for key, found in _trained(content).items()])[:16]


def _trained(content: Content) -> dict[str, Sequence[str]]:
    preserved = content.get("preserved", {})
    return {**content["training"], **{f"{key} of loss.preservation": found for key, found in preserved.items()}}


def changes(version: Path | None, now: Content) -> str:
    """What is not as the version last knew it, in words.

    Raises:
        RunError: what it knew cannot be read.
    """
    kept: Any = None if version is None else history.read_object(version / history.DATA)
    if kept is None or not all(isinstance(kept.get(part, {}), dict) for part in now) or "training" not in kept:
        return "pictures, captions, names or their order changed"
    before = _trained(kept)
    after = {key: list(found) for key, found in _trained(now).items()}
    both = [key for key in after if isinstance(before.get(key), list) and len(before[key]) == 2]
    found = {
        "other captions": [key for key in both if before[key][0] != after[key][0]],
        "other pictures": [key for key in both if before[key][1] != after[key][1]],
        "new": [key for key in after if key not in before],
        "gone": [key for key in before if key not in after],
    }
    words = [f"{len(keys)} {what} ({_named(keys)})" for what, keys in found.items() if keys]
    return ", ".join(words) or "its pairs stand in another order"


def _named(keys: Sequence[str]) -> str:
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")
