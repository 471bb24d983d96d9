"""Pairs as other trainers keep them, read where they lie or laid out in folders of our layout."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_image_finetune.data.listing import PICTURES
from qwen_image_finetune.data.sources import REFERENCES, TARGETS, read_folder
from qwen_image_finetune.disk.files import Staged, staged_folder

ANYTHING = (*PICTURES, ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl")
_RESERVED = re.compile(r"(_mask|_control_\d+)$")  # endings of names that mean something in our layout
_NAMED = 3  # files in a line


@dataclass(frozen=True)
class Pair:
    """One sample, wherever its files are."""

    target: Path
    references: tuple[Path, ...] = ()
    caption: Path | str = ""  # a file that is the caption as it stands, or its text
    mask: Path | None = None


@dataclass(frozen=True)
class Folder:
    """A data set of another trainer."""

    key: str  # theirs, which names it
    pairs: Sequence[Pair]
    root: Path  # names of pairs begin below it
    left_out: Sequence[str] = ()  # what their program would not train on either, or ours cannot, in words
    settings: dict[str, Any] = field(default_factory=dict)  # its own: keys of an entry, or of data.init_args
    visits: float = 1.0  # of an epoch to each of its pairs, on average, in their program
    share: float | None = None  # of all visits, beside the shares of the others, where their program draws by it


@dataclass(frozen=True)
class Laid:
    """What was made of a data set."""

    path: Path
    words: str


def pictures(folder: Path, nested: bool) -> list[Path]:
    """Picture files in a folder, sorted; hidden files and folders are passed over, as everywhere.

    Args:
        nested: in the folders below it, too.
    """
    found: list[Path] = []
    for directory, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if nested and not name.startswith("."))
        found += [Path(directory, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in ANYTHING)


def beside(path: Path, ending: str) -> Path:
    """The file of the same stem with another ending."""
    return path.with_name(path.stem + ending)


def named(folder: Path, stem: str) -> Path | None:
    """The picture of a stem in a folder, whatever its ending; the first of PICTURES where there are several."""
    for ending in ANYTHING:
        for spelt in (ending, ending.upper()):
            if (path := folder / f"{stem}{spelt}").is_file():
                return path
    return None


def several_lines(pairs: Iterable[Pair]) -> bool:
    """Whether some captions have more than one line that is not blank."""
    files = {pair.caption for pair in pairs if isinstance(pair.caption, Path)}
    texts = [path.read_text(encoding="utf-8-sig", errors="replace") for path in files]
    texts += [pair.caption for pair in pairs if isinstance(pair.caption, str)]
    return any(sum(bool(line.strip()) for line in text.splitlines()) > 1 for text in texts)


def some(paths: Iterable[Path | str]) -> str:
    """The first few of them, and how many."""
    names = [str(path) for path in paths]
    return f"{len(names)} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"


def readable(pairs: Iterable[Pair]) -> tuple[list[Pair], list[str]]:
    """The pairs whose pictures are of a kind that is read here, and a line about the others."""
    kept: list[Pair] = []
    other: list[Pair] = []
    for pair in pairs:
        files = (pair.target, *pair.references, *([pair.mask] if pair.mask else []))
        (kept if all(path.suffix.lower() in PICTURES for path in files) else other).append(pair)
    said = f"left out: {some(pair.target for pair in other)} of a kind that is not read: save them as PNG or JPEG"
    return kept, [said] if other else []


def in_place(pairs: Sequence[Pair]) -> Path | None:
    """The folder in which our own reader finds exactly these pairs, or None."""
    homes = {pair.target.parent for pair in pairs}
    home = next(iter(homes)) if len(homes) == 1 else None
    if home is None or home.name != TARGETS:
        return None
    rows, problems = read_folder(home.parent, masks=any(pair.mask for pair in pairs))
    ours = {(row.target, row.references, row.caption, row.mask) for row in rows}
    theirs = {(pair.target, pair.references, pair.caption, pair.mask) for pair in pairs}
    return home.parent if not problems and ours == theirs else None


def lay_out(folder: Path, pairs: Sequence[Pair], root: Path) -> str:
    """Write pairs as a folder of our layout, which replaces one of that name; in words, what was linked and copied.

    Pictures and captions are hard links, which take no room; across file systems they are copies.

    Raises:
        DiskFull: no space is left. Nothing half-made stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    done: Counter[str] = Counter()
    with staged_folder(folder, sealed=False) as stage:
        for name, pair in zip(_names(pairs, root), pairs, strict=True):
            done[_put(pair.target, stage, f"{TARGETS}/{name}{pair.target.suffix}")] += 1
            for number, reference in enumerate(pair.references):
                home = f"{REFERENCES}_{number}" if number else REFERENCES
                done[_put(reference, stage, f"{home}/{name}{reference.suffix}")] += 1
            if pair.mask is not None:
                done[_put(pair.mask, stage, f"{TARGETS}/{name}_mask{pair.mask.suffix}")] += 1
            if isinstance(pair.caption, Path):
                done[_put(pair.caption, stage, f"{TARGETS}/{name}.txt")] += 1
            else:
                (stage / TARGETS / f"{name}.txt").write_text(pair.caption, encoding="utf-8")
                done["written"] += 1
    return ", ".join(f"{count} files {what}" for what, count in done.items())


def _put(source: Path, stage: Staged, name: str) -> str:
    """Link a file into a stage, or copy it; says which."""
    source, place = source.resolve(), stage / name  # a hard link to a link would still lead out of the folder
    place.parent.mkdir(exist_ok=True)
    try:
        os.link(source, stage / name)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, stage / name)
        return "copied"
    return "linked"


def _names(pairs: Sequence[Pair], root: Path) -> list[str]:
    """A stem for each pair: its path below `root` with underscores, and a number where that is taken."""
    names: list[str] = []
    taken: Counter[str] = Counter()
    for pair in pairs:
        inside = pair.target.relative_to(root) if pair.target.is_relative_to(root) else Path(pair.target.name)
        name = "_".join(inside.with_suffix("").parts)
        name = f"{name}_" if _RESERVED.search(name) else name
        while (key := name.lower()) in taken:
            taken[key] += 1
            name = f"{name}-{taken[key]}"
        taken[key] = 1
        names.append(name)
    return names
