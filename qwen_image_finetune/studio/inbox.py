"""What was dropped onto a data set and is not part of it yet, so that it can be looked at first.

An inbox is a folder like a data set; what has found its other half can move over.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, NamedTuple

from qwen_image_finetune.data.sources import REFERENCES, TARGETS
from qwen_image_finetune.disk.files import hidden, write_atomic
from qwen_image_finetune.studio import uploads
from qwen_image_finetune.studio.shelf import Refused, Shelf

MOST_FILES = 100_000  # in one inbox
FOLDERS = {"before": REFERENCES, "after": TARGETS}


class Waiting(NamedTuple):
    """A pair, or a half of one, that waits in the inbox; names relative to the inbox."""

    stem: str
    before: list[str]
    after: str | None
    mask: str | None
    caption: str | None  # its text


class Received(NamedTuple):
    """What became of what was sent."""

    taken: int
    refused: list[tuple[str, str]]  # name, why


class Inbox:
    """The inbox of one data set, which is there."""

    def __init__(self, shelf: Shelf, set_name: str) -> None:
        self.shelf, self.set_name = shelf, set_name
        self.data_set = shelf.folder(set_name)
        self.folder = shelf.own / "inbox" / hashlib.sha256(set_name.encode()).hexdigest()[:16]

    def receive(self, name: str, content: Path, side: uploads.Side | None) -> Received:
        """Take in a picture, a caption or a zip of them that was sent under `name`; `content` is removed."""
        refused: list[tuple[str, str]] = []
        taken = 0

        def take(inner: str, stream: IO[bytes]) -> None:
            nonlocal taken
            self._take(inner, stream, side)
            taken += 1

        try:
            if name.lower().endswith(".zip"):
                refused += uploads.unpack(content, take)
            else:
                with open(content, "rb") as stream:
                    take(name, stream)
        except Refused as error:
            refused.append((name, str(error)))
        finally:
            content.unlink(missing_ok=True)
        return Received(taken, refused)

    def _take(self, name: str, stream: IO[bytes], side: uploads.Side | None) -> None:
        place = uploads.place_of(name, side)
        if place.side is None:
            raise Refused("before or after the edit? Its name does not say: drop it onto the side it belongs to")
        folder = self.folder / FOLDERS[place.side]
        folder.mkdir(parents=True, exist_ok=True)
        if len(os.listdir(folder)) >= MOST_FILES:
            raise Refused(f"the inbox is full ({MOST_FILES:,} files): move its pairs to the data set first")
        partial = hidden(folder / place.name, "partial")
        try:
            uploads.copy_bounded(
                stream, partial, uploads.LARGEST_CAPTION if place.is_caption else uploads.LARGEST_PICTURE
            )
            if place.is_caption:
                _check_text(partial)
            else:
                uploads.check_picture(partial)
                for other in folder.glob(f"{_literal(place.name.removesuffix(place.ending))}.*"):
                    if other.suffix != ".txt":
                        other.unlink()  # sent again, maybe in another format
            os.replace(partial, folder / place.name)
        finally:
            partial.unlink(missing_ok=True)

    def waiting(self) -> list[Waiting]:
        """Everything in the inbox, by stem."""
        before, after = (_pictures(self.folder / side) for side in (REFERENCES, TARGETS))
        masks = {stem for stem in after if stem.endswith("_mask") and stem.removesuffix("_mask") in after}
        first = {stem.partition("_control_")[0] for stem in before}
        found = []
        for stem in sorted({*first, *(set(after) - masks)}):
            references = [before[each] for each in sorted(before) if each.partition("_control_")[0] == stem]
            caption = self.folder / TARGETS / f"{stem}.txt"
            text = caption.read_text(encoding="utf-8-sig", errors="replace").strip() if caption.is_file() else None
            found.append(Waiting(stem, references, after.get(stem), after.get(f"{stem}_mask"), text))
        return found

    def join(self, before: str, after: str) -> None:
        """Let the reference with the stem `before` belong to the target with the stem `after`."""
        halves = {each.stem: each for each in self.waiting()}
        one, other = halves.get(before), halves.get(after)
        if one is None or other is None or one.after is not None or other.before:
            raise Refused("one of the two has found its other half meanwhile; load the page again", 409)
        folder = self.folder / REFERENCES
        for name in one.before:
            os.rename(folder / name, folder / (after + name.removeprefix(before)))

    def accept(self, caption: str) -> int:
        """Move every whole pair into the data set; returns how many. A name that is taken there gets a number.

        Args:
            caption: for those that came without one.
        """
        pairs = [each for each in self.waiting() if each.after is not None and each.before]
        targets, references = self.data_set / TARGETS, self.data_set / REFERENCES
        for folder in (targets, references):
            folder.mkdir(parents=True, exist_ok=True)
        taken = {path.stem for folder in (targets, references) for path in folder.iterdir()}
        for pair in pairs:
            assert pair.after is not None
            stem, number = pair.stem, 1
            while stem in taken:
                number += 1
                stem = f"{pair.stem} {number}"
            taken.add(stem)
            write_atomic(targets / f"{stem}.txt", pair.caption if pair.caption is not None else caption)
            (self.folder / TARGETS / f"{pair.stem}.txt").unlink(missing_ok=True)
            for name in pair.before:
                shutil.move(self.folder / REFERENCES / name, references / (stem + name.removeprefix(pair.stem)))
            for moved in (pair.mask, pair.after):
                if moved is not None:
                    shutil.move(self.folder / TARGETS / moved, targets / (stem + moved.removeprefix(pair.stem)))
        return len(pairs)

    def picture(self, side: str, name: str) -> Path:
        """A picture in the inbox.

        Raises:
            Refused: there is none of that name.
        """
        folder = self.folder / FOLDERS.get(side, "-")
        if not folder.is_dir() or name not in os.listdir(folder):
            raise Refused("there is no such picture", 404)
        return folder / name

    def clear(self) -> None:
        """Forget everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _pictures(folder: Path) -> dict[str, str]:
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {Path(name).stem: name for name in names if not name.startswith(".") and not name.endswith(".txt")}


def _check_text(path: Path) -> None:
    try:
        path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("not text in UTF-8") from error


def _literal(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
