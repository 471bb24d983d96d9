"""Encoded tensors on disk, keyed by content and settings.

One entry is one safetensors file, named by the hash of everything that decides its value: the bytes of the source
files, crop and size, the prompt, the weights of the encoder and their precision. So a change of any of these misses,
nothing else does, and entries can be shared by runs, data sets and processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from qwen_image_finetune.data import shards
from qwen_image_finetune.disk.files import clean_leftovers, write_atomic
from qwen_image_finetune.disk.locks import FileLock
from qwen_image_finetune.disk.reading import MEBIBYTE, Unreadable, read_json
from qwen_image_finetune.records import memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "I64": "int64"}  # what is stored
FORMAT = 1  # part of every key: raise it when the meaning of stored tensors changes
USUAL_HEADER = 1024  # bytes that hold nearly every one
PART = 1 << 19  # bytes that are read and summed at a time: a second-level cache holds them
UNSUMMED = "0" * 32  # stands where the checksum will, while it is taken
HASH = re.compile(r"[0-9a-f]{64}")
HUB_FOLDER = re.compile(r"(models|datasets|spaces)--")
LARGEST_MEMORY = 1024 * MEBIBYTE
SETTLED = 2_000_000_000  # nanoseconds: the clocks of file systems tick more often
SUM_IN_FILE = re.compile(rb'"xxh3":"([0-9a-f]{32})"')


class DamagedEntry(RuntimeError):
    """A stored file whose bytes are not the ones that were written."""


def entry_key(**decides: Any) -> str:
    """Hash, 64 hexadecimal digits, of everything that decides a tensor's value (JSON types only)."""
    text = json.dumps({"format": FORMAT, **decides}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """A folder of entries: dictionaries of named tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The file of an entry, whether or not it is there."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a file, each once, in their order. Lists folders once, so that large stores stay quick."""
        present: dict[str, set[str]] = {}
        result = dict.fromkeys(keys)
        for key in list(result):
            shard = key[:2]
            if shard not in present:
                folder = self.folder / shard
                present[shard] = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
            if f"{key}.safetensors" in present[shard]:
                del result[key]
        return list(result)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store named tensors; the file appears whole or not at all."""
        from safetensors.torch import save

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = save(contiguous, metadata={"xxh3": UNSUMMED})
        place = _place_of_sum(data)
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        digits = _begin_sum(key, data, place).hexdigest().encode()
        write_atomic(path, data[: place.start] + digits + data[place.stop :])

    def open(self, key: str) -> Entry:
        """What an entry holds, by its header; bytes of tensors are read by the entry itself, to where they are wanted.

        Raises:
            DamagedEntry: the file is cut short or is not ours.
            FileNotFoundError: there is no such entry.
        """
        return Entry(self.path(key), key)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU. Raises as `open` and `Entry.fill` do."""
        return self.open(key).read()

    def verify(self, key: str) -> bool:
        """Whether an entry is there and undamaged."""
        try:
            self.read(key)
        except (FileNotFoundError, DamagedEntry):
            return False
        return True

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Around everything that writes: whoever finds that nobody else writes removes what killed processes left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        try:
            alone = FileLock(path, wait=False)
        except BlockingIOError:
            pass
        else:
            for folder in (self.folder, *(entry for entry in self.folder.iterdir() if len(entry.name) == 2)):
                clean_leftovers(folder)
            alone.release()
        shared = FileLock(path, wait=True, shared=True)
        try:
            yield
        finally:
            shared.release()


class Entry:
    """A stored file of which the header is known.

    Nothing stays open: a batch may be of hundreds of entries.

    Attributes:
        tensors: by name, on the meta device: shapes and dtypes, not yet known to be what was written.
    """

    def __init__(self, path: Path, key: str) -> None:
        import torch

        self.path, self.key = path, key
        with _opened(path) as file:
            size = os.fstat(file).st_size
            try:
                self._header = _header(file, size)
                self._sum = _place_of_sum(self._header)
                described = _described(self._header[8 : self._sum.start] + self._header[self._sum.stop :])
                if size != len(self._header) + sum(count for *_, count in described):
                    raise ValueError("it has another length than its header says")
            except ValueError as error:
                raise self._damaged(error) from error
        self.tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape, _ in described}

    def read(self) -> dict[str, Tensor]:
        """The tensors, on the CPU, by name. Raises as `fill` does."""
        read = {name: memory(meta.shape, meta.dtype) for name, meta in self.tensors.items()}
        self.fill([bytes_of(tensor) for tensor in read.values()])
        return read

    def fill(self, places: Iterable[memoryview]) -> None:
        """Read the bytes of the tensors, in the order of `tensors`, each to a place of its length.

        Raises:
            DamagedEntry: bytes are not the ones that were written; the places then hold anything.
        """
        with _opened(self.path) as file:
            header = os.read(file, len(self._header))
            digest = _begin_sum(self.key, header, self._sum)
            whole = all(_filled(file, place, digest) for place in places)
        if not whole or header[self._sum] != digest.hexdigest().encode():
            raise self._damaged("its bytes are not the ones that were written")

    def _damaged(self, why: object) -> DamagedEntry:
        return DamagedEntry(f"{self.path} is damaged: {why}; the next start encodes it again")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor: a file object would take longer to make than an entry's header to read."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def _header(file: int, size: int) -> bytes:
    """Length and header of a safetensors file of `size` bytes; those of the tensors follow. Raises ValueError."""
    begun = os.pread(file, USUAL_HEADER, 0)
    end = 8 + int.from_bytes(begun[:8], "little")
    if len(begun) < 8 or end > size:
        raise ValueError("it is cut short")
    return begun[:end] if end <= len(begun) else begun + os.pread(file, end - len(begun), len(begun))


@lru_cache(64)  # entries of one geometry differ in their checksums alone
def _described(header: bytes) -> tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]:
    """Name, dtype, shape and number of bytes of each tensor, in the order of its bytes. Raises ValueError."""
    import torch

    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        tensors, end = [], 0
        for name, entry in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
            dtype: torch.dtype = getattr(torch, DTYPES[entry["dtype"]])
            shape = tuple(entry["shape"])
            count = math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or entry["data_offsets"] != [end, end + count]:
                raise ValueError("its header describes other bytes")
            tensors.append((name, dtype, shape, count))
            end += count
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its header is not one of ours") from error
    return tuple(tensors)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    data: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return data


def _filled(file: int, place: memoryview, digest: xxhash.xxh3_128) -> bool:
    """Fill `place` from where `file` stands, and add the bytes to the checksum; whether there were enough.

    The checksum is taken of each part while it is still near the processor; fetching everything twice from memory would
    cost as much as the checksum itself.
    """
    filled = 0
    while filled < len(place) and (count := os.readv(file, [part := place[filled : filled + PART]])):
        digest.update(part[:count])
        filled += count
    return filled == len(place)


def _place_of_sum(data: bytes) -> slice:
    """Where the digits of the checksum stand in the header."""
    length = int.from_bytes(data[:8], "little")
    found = SUM_IN_FILE.search(data, 8, min(8 + length, len(data)))  # a damaged length may be beyond any integer of C
    if found is None:
        raise ValueError("its header holds no checksum")
    return slice(found.start(1), found.end(1))


def _begin_sum(key: str, data: bytes, place: slice) -> xxhash.xxh3_128:
    """xxh3 of the key and the beginning of a file, without the digits of the checksum itself; `update` adds the rest.

    With the key in it, an entry under the name of another one is as damaged as one whose bytes changed.

    xxh3 runs at memory speed; sha256 would make reading several times slower, and nobody attacks a local cache.
    """
    view = memoryview(data)
    digest = xxhash.xxh3_128(key.encode())
    digest.update(view[: place.start])
    digest.update(view[place.stop :])
    return digest


class Fingerprints:
    """Content hashes of files, remembered so that each is read once for as long as it is surely the same file.

    That is known by size, inode, and times of modification and change: whatever sets the former back leaves the latter,
    which only the kernel writes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "fingerprints.json"
        self._changed = False
        self._known = _remembered(self.path)  # path -> what `_state` says of the file, and its hash
        self._recent: set[str] = set()  # may change again without any time telling

    def file(self, path: Path) -> str:
        """sha256 of the bytes of a file, or of a member of a shard.

        In the hub's cache a large file is a link to a blob that bears its hash as name.
        """
        if shards.member_of(path) is not None:
            return shards.digest(path)
        resolved = path.resolve()
        if _is_hub_blob(path, resolved):
            return resolved.name
        name, state = str(resolved), _state(resolved)
        known = self._known.get(name)
        if known is not None and known[0] == state:
            return known[1]
        with resolved.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._known[name] = (state, digest)
        (self._recent.add if time.time_ns() - max(state[1:3]) < SETTLED else self._recent.discard)(name)
        self._changed = True
        return digest

    def folders(self, folders: Iterable[Path]) -> str:
        """Hash over names and contents of all files below some folders: the identity of an encoder."""
        names = [
            (folder.name, str(path.relative_to(folder)), self.file(path))
            for folder in folders
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        return entry_key(files=names)

    def save(self) -> None:
        """Remember across runs. Several processes may save: the last one wins, and nothing is lost but time."""
        if self._changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = {name: [*state, digest] for name, (state, digest) in self._known.items() if name not in self._recent}
            write_atomic(self.path, json.dumps(kept))
            self._changed = False


def _state(path: Path) -> list[int]:
    """Size, times of modification and change, and inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _remembered(path: Path) -> dict[str, tuple[list[int], str]]:
    """What `Fingerprints.save` wrote; what is of another shape costs one more reading of its file, nothing else."""
    try:
        found = read_json(path, LARGEST_MEMORY)
    except (OSError, Unreadable):
        return {}
    return {
        name: (entry[:4], entry[4])
        for name, entry in found.items()
        if isinstance(entry, list) and len(entry) == 5 and isinstance(entry[4], str) and HASH.fullmatch(entry[4])
    }


def _is_hub_blob(path: Path, resolved: Path) -> bool:
    """Whether a file of a snapshot, models--OWNER--NAME/snapshots/REVISION/..., leads to one of the hub's own blobs."""
    blobs = resolved.parent
    if blobs.name != "blobs" or not HASH.fullmatch(resolved.name) or not HUB_FOLDER.match(blobs.parent.name):
        return False
    return any(
        folder.name == "snapshots" and folder.parent.name == blobs.parent.name for folder in path.absolute().parents
    )
