"""Pictures inside larger files, rows of parquet and arrow files, members of tar files: addressed as in a folder.

`SHARD.parquet/12/edited` is a cell, `SHARD.parquet/12/references/0` one of a list, `SHARD.tar/000012.jpg` a member.
Whoever opens a picture by its path needs to know nothing of it. pyarrow is loaded where a table is opened.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TABLES = (".parquet", ".arrow")
ENDINGS = (*TABLES, ".tar")
_ADDRESS = re.compile(r"(.+\.(?:parquet|arrow|tar))/(.+)", re.DOTALL)
_OPEN = 4  # columns of row groups that are kept: a hundred pictures each


class ShardError(OSError):
    """A shard, or a member of it, that cannot be read; `OSError`, as of any file."""


class Cell(NamedTuple):
    """What is known of a picture in a shard without opening it."""

    width: int  # upright
    height: int
    digest: str  # sha256 of its bytes


@dataclass
class _Memory:
    """Of one process: what was opened, what is known, and where shards that are not here come from."""

    lock: threading.RLock
    columns: OrderedDict[tuple[str, int, str], Any]
    members: dict[str, dict[str, tuple[int, int]]]  # of tar files: name -> (offset, size)
    cells: dict[str, dict[str, Cell]]
    fetch: dict[str, Callable[[], None]]


_memory = _Memory(threading.RLock(), OrderedDict(), {}, {}, {})


def member_of(path: str | Path) -> tuple[str, str] | None:
    """(shard, member) of an address inside a shard; None of a plain file."""
    text = os.fspath(path)
    if not any(f"{ending}/" in text for ending in ENDINGS):
        return None
    found = _ADDRESS.fullmatch(text)
    return None if found is None or os.path.isdir(found[1]) else (found[1], found[2])


def opened(path: str | Path) -> BinaryIO:
    """A file, or a member of a shard, open for reading its bytes.

    Raises:
        OSError: it is not there, or the shard is damaged.
    """
    inside = member_of(path)
    return open(path, "rb") if inside is None else io.BytesIO(content(*inside))


def digest(path: str | Path) -> str:
    """sha256 of a file's bytes, or of a member's; what an index knows is not read again."""
    if (cell := known(path)) is not None:
        return cell.digest
    if (inside := member_of(path)) is not None:
        return hashlib.sha256(content(*inside)).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known(path: str | Path) -> Cell | None:
    """What an index says of a picture; None of plain files, and of shards that were not indexed."""
    inside = member_of(path)
    return None if inside is None else _memory.cells.get(inside[0], {}).get(inside[1])


def remember(shard: Path, cells: dict[str, Cell]) -> None:
    """Keep what an index says of a shard's pictures."""
    _memory.cells[str(shard)] = cells


def comes_from(shard: Path, fetch: Callable[[], None]) -> None:
    """How a shard is brought to this machine when something in it is opened and it is not there."""
    _memory.fetch[str(shard)] = fetch


def present(shard: str) -> None:
    """Bring a shard here if it is not.

    Raises:
        OSError: it cannot be.
    """
    if not os.path.exists(shard) and (fetch := _memory.fetch.get(shard)) is not None:
        with _memory.lock:
            fetch()


def let_go(shard: Path) -> None:
    """Close what is open of a shard."""
    with _memory.lock:
        _memory.members.pop(str(shard), None)
        for key in [key for key in _memory.columns if key[0] == str(shard)]:
            del _memory.columns[key]


def content(shard: str, member: str) -> bytes:
    """The bytes of a member.

    Raises:
        ShardError: there is none, or it has none of its own.
    """
    present(shard)
    if shard.endswith(".tar"):
        offset, size = _tar_members(shard).get(member, (0, -1))
        if size < 0:
            raise FileNotFoundError(f"{shard} has no member {member}")
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)
    row, column, *place = member.split("/")
    value = _value(shard, int(row), column)
    return picture_bytes(value[int(place[0])] if place else value, f"{shard}/{member}")


def path_in(value: Any) -> str | None:
    """The path of a file that a picture's cell names in place of the picture: as a text, or as `{path}` alone."""
    if isinstance(value, dict):
        value = None if value.get("bytes") else value.get("path")
    return value if isinstance(value, str) and value else None


def picture_bytes(value: Any, name: str) -> bytes:
    """The bytes of a picture's cell: as such, or as `{bytes, path}`.

    Raises:
        ShardError: it names a file elsewhere, or is no picture.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    raise ShardError(
        f"{name}: {'a path' if isinstance(value, str) else 'nothing'} where the bytes of a picture should be"
    )


def _tar_members(shard: str) -> dict[str, tuple[int, int]]:
    with _memory.lock:
        if shard not in _memory.members:
            try:
                with tarfile.open(shard, "r:") as archive:
                    _memory.members[shard] = {
                        member.name: (member.offset_data, member.size) for member in archive if member.isfile()
                    }
            except tarfile.TarError as error:
                raise ShardError(f"{shard}: cannot be read as a tar file ({error})") from error
        return _memory.members[shard]


def _value(shard: str, row: int, column: str) -> Any:
    with _memory.lock:
        group, place = _group(shard, row)
        key = (shard, group, column)
        if key in _memory.columns:
            _memory.columns.move_to_end(key)
        else:
            _memory.columns[key] = _read_group(shard, group, [column]).column(0)
            while len(_memory.columns) > _OPEN:
                _memory.columns.popitem(last=False)
        return _memory.columns[key][place].as_py()


def _group(shard: str, row: int) -> tuple[int, int]:
    """(row group, place in it) of a row."""
    for number, size in enumerate(_sizes(shard)):
        if row < size:
            return number, row
        row -= size
    raise ShardError(f"{shard} has no row {row}")


def _sizes(shard: str) -> list[int]:
    with _table(shard) as table:
        if shard.endswith(".parquet"):
            return [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
        return [batch.num_rows for batch in table]


def _read_group(shard: str, group: int, columns: list[str]) -> Any:
    import pyarrow

    with _table(shard) as table:
        if shard.endswith(".parquet"):
            return table.read_row_group(group, columns=columns)
        batches = list(table)
        return pyarrow.Table.from_batches([batches[group]]).select(columns)


class _table:
    """An open parquet file, or the batches of an arrow file."""

    def __init__(self, shard: str) -> None:
        self.shard = shard

    def __enter__(self) -> Any:
        import pyarrow
        from pyarrow import ipc, parquet

        try:
            if self.shard.endswith(".parquet"):
                self.file = parquet.ParquetFile(self.shard)
                return self.file
            self.file = pyarrow.memory_map(self.shard)
            try:
                return ipc.open_stream(self.file).read_all().to_batches()
            except pyarrow.ArrowInvalid:
                return ipc.open_file(self.file).read_all().to_batches()
        except (pyarrow.ArrowException, OSError) as error:
            raise ShardError(f"{self.shard}: cannot be read as a table ({error})") from error

    def __exit__(self, *raised: object) -> None:
        self.file.close()


def columns_of(shard: str) -> list[str]:
    """Names of the columns of a table, or, of a tar file, what its members are called behind their keys."""
    present(shard)
    if shard.endswith(".tar"):
        return list(dict.fromkeys(name for sample in _samples(shard) for name in sample[1]))
    with _table(shard) as table:
        return list(table.schema_arrow.names if shard.endswith(".parquet") else table[0].schema.names if table else [])


def rows_of(shard: str, columns: list[str]) -> Iterator[tuple[str, dict[str, tuple[str, Any]]]]:
    """Every row: its name, and for each of the columns that it has the member's name and its value.

    Rows come in order and one row group at a time, so a shard may be larger than the memory.
    """
    present(shard)
    if shard.endswith(".tar"):
        for key, sample in _samples(shard):
            yield key, {column: sample[column] for column in columns if column in sample}
        return
    row = 0
    for number in range(len(_sizes(shard))):
        group = _read_group(shard, number, columns)
        for place in range(group.num_rows):
            values = {name: group.column(name)[place].as_py() for name in columns}
            yield str(row), {name: (f"{row}/{name}", value) for name, value in values.items() if value is not None}
            row += 1


def _samples(shard: str) -> Iterator[tuple[str, dict[str, tuple[str, Any]]]]:
    """Members that share a name up to its first dot are one sample (the convention of WebDataset).

    Texts and the fields of .json members are read; a picture's value is its bytes.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in _tar_members(shard):
        folder, _, last = name.rpartition("/")
        stem, _, column = last.partition(".")
        groups.setdefault(f"{folder}/{stem}" if folder else stem, {})[column.lower()] = name
    for key, files in groups.items():
        sample: dict[str, tuple[str, Any]] = {}
        for column, name in files.items():
            data = content(shard, name)
            if column.endswith("json"):
                sample |= {field: (name, value) for field, value in _fields(data).items()}
            elif column.rpartition(".")[2] in ("txt", "cls", "caption"):
                sample[column] = (name, data.decode("utf-8-sig", errors="strict"))
            else:
                sample[re.sub(r"\.?(jpe?g|png|webp)$", "", column) or "image"] = (name, data)
        yield key, sample


def _fields(data: bytes) -> dict[str, Any]:
    import json

    try:
        found = json.loads(data)
    except ValueError as error:
        raise ShardError(f"a member that is no JSON ({error})") from error
    return found if isinstance(found, dict) else {}
