"""A data set as a person looks at it: its pairs, what does not fit, and captions that are edited."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_image_finetune.data.listing import PICTURES, Row, Tree
from qwen_image_finetune.data.metadata import METADATA, with_prompts
from qwen_image_finetune.data.sources import REFERENCES, TARGETS, read_folder
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.studio.shelf import Refused, Shelf

LONGEST_CAPTION = 20_000  # characters


@dataclass(frozen=True)
class Listing:
    """What a data set holds; no picture is opened for it."""

    rows: Sequence[Row]
    problems: Sequence[str]


@dataclass(frozen=True)
class Orphans:
    """Pictures that lack their other half: names relative to the shelf."""

    before: list[str]  # references without a target
    after: list[str]  # targets without a reference
    uncaptioned: list[str]  # targets with a reference, but without a caption


class DataSets:
    """The data sets of a shelf; a listing is read again when a name in it has changed."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._listings: dict[str, tuple[tuple[int, ...], Listing]] = {}
        self._writing = threading.Lock()  # captions are compared and written in one go

    def listing(self, name: str) -> Listing:
        """Raises Refused where there is no such folder."""
        folder = self.shelf.folder(name)
        stamp = tuple(_changed(path) for path in (folder, *sorted(folder.iterdir())))
        known = self._listings.get(name)
        if known is None or known[0] != stamp:
            rows, problems = read_folder(folder, masks=True)
            known = (stamp, Listing(rows, [line.replace(f"{folder}/", "") for line in problems]))
            self._listings[name] = known
        return known[1]

    def row(self, name: str, key: str) -> Row:
        """Raises Refused where there is no such pair."""
        for row in self.listing(name).rows:
            if row.key == key:
                return row
        raise Refused(f"there is no pair {key!r} in {name} any more", 404)

    def file(self, row: Row, name: str) -> str:
        """Name on the shelf of a file of a row."""
        return self.shelf.name(self.shelf.inside(self.shelf.name(row.folder) + "/" + name))

    def caption(self, row: Row) -> str:
        """The prompt as it is stored, or a line for each of a list, without white space around it; "" where it cannot
        be read."""
        if row.caption_name is None:
            return "\n".join((row.prompt or "", *row.more_prompts)).strip()
        path = self.shelf.inside(self.file(row, row.caption_name))
        return path.read_text(encoding="utf-8-sig", errors="replace").strip() if path.is_file() else ""

    def write_caption(self, name: str, key: str, before: str, after: str) -> None:
        """Replace a caption, whole or not at all.

        Raises:
            Refused: it is not `before` any more: someone else has changed it.
        """
        with self._writing:
            row = self.row(name, key)
            if self.caption(row) != before.strip():
                raise Refused("this caption was changed elsewhere meanwhile; load the page again to see it", 409)
            self._write([(row, after)])

    def rewrite(self, name: str, keys: Sequence[str], change: Change) -> int:
        """Change the captions of many pairs; each file is written whole or not at all. Returns how many changed."""
        wanted = set(keys)
        with self._writing:
            rows = [row for row in self.listing(name).rows if row.key in wanted]
            changed = [(row, after) for row in rows if (after := change.of(before := self.caption(row))) != before]
            self._write(changed)
        return len(changed)

    def _write(self, changed: Sequence[tuple[Row, str]]) -> None:
        """New captions: in a file of their own, or all at once in the table that names the pairs."""
        if any(len(caption) > LONGEST_CAPTION for _, caption in changed):
            raise Refused(f"a caption has at most {LONGEST_CAPTION} characters")
        tables: dict[Path, dict[str, str]] = {}
        for row, caption in changed:
            text = caption.replace("\r\n", "\n").strip()
            if row.caption_name is None:
                tables.setdefault(row.folder, {})[row.key] = text
            else:
                write_atomic(self.shelf.inside(self.file(row, row.caption_name)), f"{text}\n" if text else "")
        for folder, prompts in tables.items():
            (table,) = (name for name in METADATA if (folder / name).is_file())
            path = self.shelf.inside(f"{self.shelf.name(folder)}/{table}")
            try:
                write_atomic(path, with_prompts(Tree(folder), table, prompts))
            except (KeyError, ValueError):  # edited meanwhile
                raise Refused(f"{table} was changed elsewhere meanwhile; load the page again", 409) from None

    def orphans(self, name: str) -> Orphans:
        """What of the two folders has no other half."""
        folder = self.shelf.folder(name)
        before, after = (_stems(folder / side) for side in (REFERENCES, TARGETS))
        masks = {stem for stem in after if stem.endswith("_mask") and stem.removesuffix("_mask") in after}
        targets = {stem: file for stem, file in after.items() if stem not in masks}
        has_references = (folder / REFERENCES).is_dir()
        names = os.listdir(folder / TARGETS) if (folder / TARGETS).is_dir() else []
        captions = {file.removesuffix(".txt") for file in names if file.endswith(".txt")}
        lone_before = [
            file
            for stem, file in before.items()
            if stem not in targets and stem.partition("_control_")[0] not in targets
        ]
        lone_after = [file for stem, file in targets.items() if has_references and stem not in before]
        uncaptioned = [
            file for stem, file in targets.items() if (stem in before or not has_references) and stem not in captions
        ]
        return Orphans(
            [f"{name}/{REFERENCES}/{file}" for file in lone_before],
            [f"{name}/{TARGETS}/{file}" for file in lone_after],
            [f"{name}/{TARGETS}/{file}" for file in uncaptioned],
        )

    def join(self, name: str, before: str, after: str) -> str:
        """Rename a reference so that it fits a target; returns its new name.

        Raises:
            Refused: they are no orphans of this set, or the name is taken.
        """
        orphans = self.orphans(name)
        if before not in orphans.before or after not in orphans.after:
            raise Refused("one of the two has found its other half meanwhile; load the page again", 409)
        source = self.shelf.inside(before)
        final = source.with_name(Path(after).stem + source.suffix)
        if final.exists():
            raise Refused(f"{self.shelf.name(final)} is there already")
        source.rename(final)
        return self.shelf.name(final)


@dataclass(frozen=True)
class Change:
    """What happens to each of many captions: text is found and replaced, then comes the prefix, then the suffix."""

    find: str = ""
    replace: str = ""
    prefix: str = ""
    suffix: str = ""

    def of(self, caption: str) -> str:
        """The caption after it; what begins or ends with the addition already gets it no second time."""
        text = caption.replace(self.find, self.replace) if self.find else caption
        if self.prefix and not text.startswith(self.prefix.strip()):
            text = self.prefix + text
        if self.suffix and not text.endswith(self.suffix.strip()):
            text = text + self.suffix
        return text.strip()


def _stems(folder: Path) -> dict[str, str]:
    """stem -> file of the pictures directly in a folder, sorted."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {
        Path(name).stem: name for name in names if Path(name).suffix.lower() in PICTURES and not name.startswith(".")
    }


def _changed(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except FileNotFoundError:  # gone since its name was read
        return 0
