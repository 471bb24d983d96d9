"""Where deleted pairs lie until the bin is emptied."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.studio.shelf import Refused, Shelf

WHAT = "what.json"


@dataclass(frozen=True)
class Thrown:
    """One thing in the bin."""

    id: str
    title: str
    files: tuple[str, ...]  # where they were, relative to the shelf; in the bin they are called 0, 1, ...


class Bin:
    """The bin of a shelf: a folder for each thing thrown away, with a note of where its files were."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self.folder = shelf, shelf.own / "bin"

    def throw(self, title: str, files: Sequence[Path]) -> str:
        """Move files of the shelf away; returns the name to take them back by."""
        identity = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        place = self.folder / identity
        place.mkdir(parents=True)
        note = {"title": title, "files": [self.shelf.name(path) for path in files]}
        write_atomic(place / WHAT, json.dumps(note, ensure_ascii=False))  # first: what is moved can be moved back
        for number, path in enumerate(files):
            os.rename(path, place / str(number))
        return identity

    def throw_pair(self, row: Row, set_name: str) -> str:
        """The files of a pair.

        Raises:
            Refused: a table names them.
        """
        if row.caption_name is None:
            raise Refused("this set is named by a table (metadata): take the line out there")
        names = (row.caption_name, row.target_name, *row.reference_names, *([row.mask_name] if row.mask_name else []))
        return self.throw(f"{row.key} of {set_name}", [row.folder / name for name in names])

    def content(self) -> list[Thrown]:
        """The newest first."""
        found = []
        for note in sorted(self.folder.glob(f"*/{WHAT}"), reverse=True):
            told = json.loads(note.read_text(encoding="utf-8"))
            found.append(Thrown(note.parent.name, told["title"], tuple(told["files"])))
        return found

    def restore(self, identity: str) -> Thrown:
        """Put back what was thrown away.

        Raises:
            Refused: it is not in the bin, or something has taken its place.
        """
        thrown = next((each for each in self.content() if each.id == identity), None)
        if thrown is None:
            raise Refused("that is not in the bin (any more)", 404)
        place = self.folder / identity
        moves = [(place / str(number), self.shelf.inside(name)) for number, name in enumerate(thrown.files)]
        moves = [(source, final) for source, final in moves if source.exists()]
        if taken := [self.shelf.name(final) for _, final in moves if final.exists()]:
            raise Refused(f"{taken[0]} is there again: rename or delete it first")
        for source, final in moves:
            final.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, final)
        shutil.rmtree(place)
        return thrown

    def empty(self) -> int:
        """Delete everything for good; returns how many things that were."""
        things = self.content()
        for thing in things:
            shutil.rmtree(self.folder / thing.id)
        return len(things)
