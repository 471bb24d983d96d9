"""Which rows a run leaves out because they cannot be read, and why: one line each in its version folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.reading import MEBIBYTE, Unreadable, read_regular
from qwen_image_finetune.disk.versions import RunError

FILE = "left_out.jsonl"  # in the version folder
LARGEST = 1024 * MEBIBYTE


@dataclass(frozen=True)
class LeftOut:
    """A row that is not trained on."""

    key: str
    reasons: tuple[str, ...]  # with the files' names

    def __str__(self) -> str:
        return f"{self.key}: {'; '.join(self.reasons)}"


def write(version: Path, rows: Sequence[LeftOut]) -> None:
    """The list of a run that begins or goes on; no file where there is nothing to list."""
    if rows or (version / FILE).exists():
        write_atomic(version / FILE, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def read(version: Path) -> tuple[LeftOut, ...]:
    """The list of a run; empty where it left out nothing.

    Raises:
        RunError: the file holds something else.
    """
    try:
        text = read_regular(version / FILE, LARGEST).decode()
        found = [json.loads(line) for line in text.split("\n") if line]
        return tuple(LeftOut(str(line["key"]), tuple(map(str, line["reasons"]))) for line in found)
    except FileNotFoundError:
        return ()
    except (Unreadable, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{version / FILE} is damaged ({error!r}); put it back from a copy or remove it") from error
