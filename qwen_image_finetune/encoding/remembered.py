"""What a run remembers of its pairs, by the content of their inputs: which it trained on, and which it held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_image_finetune.data import shards
from qwen_image_finetune.data.alike import input_of
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.history import read_object
from qwen_image_finetune.disk.versions import RunError

PAIRS = "pairs.json"  # in the version folder
Known = tuple[tuple[str, str], ...]  # (key, content of the input) of each pair


@dataclass(frozen=True)
class Remembered:
    """The pairs of a run. A pair is known by its input, whatever its file is called: an answer to it was seen."""

    trained: Known
    held_out: Known

    def was_trained_on(self, content: str) -> bool:
        """Whether an input was among those that were trained on."""
        return any(content == known for _, known in self.trained)

    def was_held_out(self, content: str) -> bool:
        """Whether an input was among those that were held out of training."""
        return any(content == known for _, known in self.held_out)


def content_of(row: Row) -> str:
    """sha256 of the file that is the input of a pair."""
    return shards.digest(input_of(row))


def remember(
    version: Path, training: ImageDataset, held_out: ImageDataset | None, digest: Callable[[Path], str]
) -> None:
    """Write down the pairs of a run that begins or goes on. What was trained on once stays trained on.

    Args:
        digest: sha256 of a file, from a memory that need not read it again.
    """

    def known(dataset: ImageDataset | None) -> Known:
        return tuple((row.key, digest(Path(input_of(row)))) for row in (dataset.rows if dataset else ()))

    before, now = read(version), known(training)
    trained = tuple(dict.fromkeys([*(before.trained if before else ()), *now]))
    contents = {content for _, content in trained}
    kept = tuple((key, content) for key, content in known(held_out) if content not in contents)
    write_atomic(version / PAIRS, json.dumps(asdict(Remembered(trained, kept)), ensure_ascii=False) + "\n")


def read(version: Path) -> Remembered | None:
    """The pairs of a run; None for one that did not write them down.

    Raises:
        RunError: the file holds something else.
    """
    found = read_object(version / PAIRS)
    if found is None:
        return None
    return Remembered(_pairs(found.get("trained"), version), _pairs(found.get("held_out"), version))


def _pairs(found: object, version: Path) -> Known:
    if not isinstance(found, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in found):
        raise RunError(f"{version / PAIRS} is damaged: it lacks pairs of the run; put it back from a copy or remove it")
    return tuple((str(key), str(content)) for key, content in found)
