"""Looks through a data set, as `qif check` does, and writes down what is noted of each pair.

A process of its own: decoding ten thousand pairs takes minutes, and the page goes on answering.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_image_finetune.data import looks
from qwen_image_finetune.data.geometry import same_aspect
from qwen_image_finetune.data.images import DataError, size_upright
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.machine import console
from qwen_image_finetune.machine.signals import StopSignals
from qwen_image_finetune.studio.pairs import DataSets
from qwen_image_finetune.studio.shelf import Shelf

# What may be noted of a pair, and how a person would say it.
WORDS = {
    "shifted": "shifted against each other",
    "unchanged": "nothing changed",
    "ratio": "different shapes",
    "small": "small picture",
    "copy": "copy of another",
    "empty": "no caption",
    "damaged": "cannot be read",
}
SMALL = 512 * 512  # pixels of a target below which it is noted
SECONDS_BETWEEN_WRITES = 2.0
CHUNK = 64  # pairs looked at between two looks at the clock


@dataclass
class Notes:
    """What was noted of a data set."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # key -> stamp, names of notes, content
    done: int = 0  # pairs looked at
    total: int = 0

    def of(self, key: str) -> list[str]:
        """Names of the notes about a pair."""
        return list(self.rows.get(key, {}).get("notes", ()))

    def counts(self) -> dict[str, int]:
        """How many pairs each note is about."""
        noted = [name for row in self.rows.values() for name in row["notes"]]
        return {name: noted.count(name) for name in WORDS if name in noted}


def notes_file(shelf: Shelf, name: str) -> Path:
    """Where the notes about a data set are kept."""
    return shelf.own / "notes" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def read_notes(shelf: Shelf, name: str) -> Notes:
    """What is noted so far; empty where nobody has looked."""
    file = notes_file(shelf, name)
    return Notes(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else Notes()


def stamp(row: Row, caption: str) -> str:
    """Changes when a file of the row, or its caption, does."""
    told = [caption]
    for path in (row.target, *row.references, *([row.mask] if row.mask else [])):
        stat = path.stat()
        told.append(f"{path.name} {stat.st_mtime_ns} {stat.st_size}")
    return hashlib.sha256("\n".join(told).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def look(row: Row, caption: str) -> dict[str, Any]:
    """What is noted of one pair."""
    paths = [str(path) for path in (row.target, *row.references, *([row.mask] if row.mask else []))]
    noted = ["empty"] if not caption else []
    found = looks.decode(paths, row.mask is not None, caption).look
    content = None
    if found is None:
        noted.append("damaged")
    else:
        content = found.content.hex()
        noted += [name for name, applies in (("unchanged", found.unchanged), ("shifted", found.shift)) if applies]
    try:
        sizes = [size_upright(path) for path in paths[: 1 + bool(row.reference_names)]]
    except DataError:
        sizes = []
    if sizes and sizes[0][0] * sizes[0][1] < SMALL:
        noted.append("small")
    if len(sizes) == 2 and not same_aspect(sizes[1], sizes[0]):
        noted.append("ratio")
    return {"notes": noted, "content": content, "stamp": stamp(row, caption)}


def look_through(shelf: Shelf, name: str) -> Notes:
    """Look at every pair that has changed since it was last looked at; writes the notes now and then."""
    sets, before = DataSets(shelf), read_notes(shelf, name).rows
    rows = sets.listing(name).rows
    notes, last = Notes(total=len(rows)), time.monotonic()

    def one(row: Row) -> dict[str, Any]:
        caption = sets.caption(row)
        known = before.get(row.key)
        if known is not None and known["stamp"] == stamp(row, caption):
            return {**known, "notes": [each for each in known["notes"] if each != "copy"]}
        return look(row, caption)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            notes.rows.update(zip((row.key for row in chunk), pool.map(one, chunk), strict=True))
            notes.done = len(notes.rows)
            if time.monotonic() - last > SECONDS_BETWEEN_WRITES:
                last = time.monotonic()
                write(shelf, name, notes)
                console.say(f"{notes.done} of {notes.total} pairs")
    originals = dict[str, str]()
    for key, row in notes.rows.items():
        if row["content"] is not None and originals.setdefault(row["content"], key) != key:
            row["notes"].append("copy")
    write(shelf, name, notes)
    return notes


def write(shelf: Shelf, name: str, notes: Notes) -> None:
    """Keep the notes."""
    file = notes_file(shelf, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(vars(notes)))


def main() -> None:
    folder, name = sys.argv[1:]
    with StopSignals():
        notes = look_through(Shelf(Path(folder)), name)
    for note, count in notes.counts().items():
        console.say(f"{count} of {notes.total} pairs: {WORDS[note]}")


if __name__ == "__main__":
    main()
