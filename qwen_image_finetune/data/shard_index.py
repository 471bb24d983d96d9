"""What is in a shard, found once and kept: its rows, and of each picture its size and the hash of its bytes.

With it a run starts without opening a picture, and the shard itself need not be on this machine any more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_finetune.data import shards
from qwen_image_finetune.data.columns import Layout, layout_of
from qwen_image_finetune.data.images import DataError, size_of
from qwen_image_finetune.data.listing import Row, RowFault, Tree, caption_fault
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.reading import MEBIBYTE, Unreadable, read_json

if TYPE_CHECKING:
    from qwen_image_finetune.config import Columns

FORMAT = 4  # raise it when an index holds something else
LARGEST = 1024 * MEBIBYTE


@dataclass(frozen=True)
class Shard:
    """One of the files of a data set."""

    folder: Path  # of the data set
    name: str  # below it
    identity: tuple[Any, ...]  # what tells another version of it

    @property
    def path(self) -> Path:
        return self.folder / self.name


def local_shard(folder: Path, name: str) -> Shard:
    """A shard that lies on this machine: another size or time is another version."""
    about = (folder / name).stat()
    return Shard(folder, name, (str((folder / name).resolve()), about.st_size, about.st_mtime_ns))


def place_of(shard: Shard, columns: Columns | None, home: Path) -> Path:
    """The file of a shard's index."""
    given = None if columns is None else columns.model_dump()
    key = hashlib.sha256(json.dumps([FORMAT, *shard.identity, given], sort_keys=True).encode()).hexdigest()
    return home / "index" / f"{key}.json"


def remove(shard: Shard) -> None:
    """Take a shard of the hub off the disk; it is brought back when something in it is opened."""
    shards.let_go(shard.path)
    shard.path.unlink(missing_ok=True)


def read_shard(
    shard: Shard, columns: Columns | None, home: Path, *, masks: bool, keep: bool
) -> tuple[list[Row], list[str]]:
    """Rows of a shard in its order, and what is wrong with others, one line each; indexes it if it is not yet.

    Args:
        masks: look for edit masks.
        keep: leave a shard that was brought here for that on the disk.

    Raises:
        OSError: it is not here and cannot be brought here, or is damaged.
    """
    place = place_of(shard, columns, home)
    try:
        found = read_json(place, LARGEST)
    except (OSError, Unreadable):
        found = _index(shard, columns)
        if not keep:
            remove(shard)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps(found, ensure_ascii=False))
    shards.remember(shard.path, {name: shards.Cell(*cell) for name, cell in found["cells"].items()})
    rows, gone, files = list[Row](), list[tuple[str, str]](), _Files(shard)
    for key, prompts, target, references, mask in found["rows"]:
        try:
            row = Row(
                key=f"{shard.name}/{key}",
                folder=shard.folder,
                target_name=files.named(target),
                reference_names=tuple(files.named(name) for name in references),
                caption_name=None,
                prompt=prompts[0],
                more_prompts=tuple(prompts[1:]),
                mask_name=files.named(mask) if masks and mask else None,
            )
        except DataError as error:
            gone += [(key, line) for line in error.problems]
        else:
            rows.append(row)
    if gone and not rows:  # of a million, one says it
        return [], [f"{shard.path}: no picture that it names is there; {gone[0][1]}"]
    faults = [RowFault(f"{shard.path}, row {key}: {line}", f"{shard.name}/{key}") for key, line in
              [*found["bad_rows"], *gone]]  # fmt: skip
    return rows, [*(f"{shard.path}: {line}" for line in found["problems"]), *faults]


_Name = str | dict[str, str]  # of a member of a shard; or {"file": path}, a file beside it, as the shard names it


class _Files:
    """Files that a shard names: below the data set's folder, or below one of the folders in that."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.tree = shard, Tree(shard.folder)
        self.homes: list[str] | None = None  # the last one that had a file is asked first

    def named(self, name: _Name) -> str:
        """The path of a picture below the data set's folder.

        Raises:
            DataError: there is no such file.
        """
        if isinstance(name, str):
            return f"{self.shard.name}/{name}"
        if self.homes is None:
            inside = sorted(each for each, kind in self.tree.list().items() if kind == "folder")
            self.homes = ["", *(f"{each}/" for each in inside)]
        for home in self.homes:
            if self.tree.file_fault(path := f"{home}{name['file']}") is None:
                self.homes.remove(home)
                self.homes.insert(0, home)
                return path
        raise DataError(
            f"{name['file']}: no such file in {self.shard.folder} or a folder in it; pictures that are packed have to "
            "be unpacked there, and those of a data set on the hub brought there"
        )


def _index(shard: Shard, columns: Columns | None) -> dict[str, Any]:
    layout = layout_of(shards.columns_of(str(shard.path)), columns)
    if isinstance(layout, str):
        return {"rows": [], "cells": {}, "problems": [layout], "bad_rows": []}
    rows: list[Any] = []
    cells: dict[str, shards.Cell] = {}
    bad: list[tuple[str, str]] = []  # (key, what is wrong)
    for row_key, whole in shards.rows_of(str(shard.path), layout.names):
        for key, row in _edits(row_key, whole, layout):
            try:
                own = list(_cells(row, layout))
                rows.append(_row(key, row, layout, [(column, name) for column, name, _ in own]))
                cells |= {name: cell for _, name, cell in own if isinstance(name, str) and cell is not None}
            except DataError as error:
                bad += [(key, line) for line in error.problems]
    return {"rows": rows, "cells": cells, "problems": [], "bad_rows": bad}


_Columns = dict[str, tuple[str, Any]]  # of each its member's name and its value


def _edits(key: str, row: _Columns, layout: Layout) -> Iterator[tuple[str, _Columns]]:
    """The edits of a row: itself, or each of its turns, whose pictures are files."""
    if layout.turns is None:
        yield key, row
        return
    turns = row[layout.turns][1] if layout.turns in row else None
    for place, turn in enumerate(turns if isinstance(turns, list) else [turns]):
        fields = turn if isinstance(turn, dict) else {}
        yield f"{key}/{place}", {name: ("", value) for name, value in fields.items() if value is not None}


def _row(key: str, row: _Columns, layout: Layout, pictures: list[tuple[str, _Name]]) -> list[Any]:
    first = next(name for column, name in pictures if column == layout.target)
    mask = next((name for column, name in pictures if column == layout.mask), None)
    references = [name for column, name in pictures if column in layout.references]
    given = row.get(layout.prompt, ("", None))[1]
    said = [each for each in given if each] if isinstance(given, list) else []  # several ways to say it
    return [key, [_prompt(each, layout.prompt) for each in said or [given]], first, references, mask]


def _prompt(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{column} is {value!r}, not a text")
    if fault := caption_fault(value):
        raise DataError(f"{column} {fault}")
    return value


def _cells(row: _Columns, layout: Layout) -> Iterator[tuple[str, _Name, shards.Cell | None]]:
    """Every picture of a row, its column and its name, and what is known of it: target, references in order, mask."""
    if row.get(layout.target, ("", None))[1] in (None, []):
        raise DataError(f"{layout.target} is empty")
    for column in (layout.target, *layout.references, *([layout.mask] if layout.mask else [])):
        if column not in row:
            continue
        name, value = row[column]
        several = value if isinstance(value, list) else [value]
        for place, each in enumerate(several):
            member = f"{name}/{place}" if isinstance(value, list) else name
            if (path := shards.path_in(each)) is not None:
                yield column, {"file": path}, None
            elif not name:
                raise DataError(f"{column} of one of its turns is no path")
            else:
                try:
                    data = shards.picture_bytes(each, column)
                except shards.ShardError as error:
                    raise DataError(str(error)) from error
                yield column, member, shards.Cell(*size_of(data, member), hashlib.sha256(data).hexdigest())
            if column == layout.target:
                break  # a list of one
