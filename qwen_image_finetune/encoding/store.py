"""Encoded tensors on disk, keyed by content and settings.

One entry is one safetensors file, named by the hash of everything that decides its value: the bytes of the source
files, crop and size, the prompt, the weights of the encoder and their precision. So a change of any of these misses,
nothing else does, and entries can be shared by runs, data sets and processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from qwen_image_finetune.disk.files import clean_leftovers, write_atomic
from qwen_image_finetune.disk.locks import FileLock

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "I64": "int64"}  # what is stored
FORMAT = 1  # part of every key: raise it when the meaning of stored tensors changes
PART = 1 << 19  # bytes that are read and summed at a time: a second-level cache holds them
UNSUMMED = "0" * 32  # stands where the checksum will, while it is taken
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
        write_atomic(path, data[: place.start] + _begin_sum(data, place).hexdigest().encode() + data[place.stop :])

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU, sharing the one buffer that the file was read into.

        Raises:
            DamagedEntry: the file is cut short, has flipped bytes or is not ours.
            FileNotFoundError: there is no such entry.
        """
        path = self.path(key)
        try:
            return _tensors(_read(path))
        except (ValueError, KeyError) as error:
            raise DamagedEntry(f"{path} is damaged: {error}; the next start encodes it again") from error

    def verify(self, key: str) -> bool:
        """Whether an entry is there and undamaged."""
        try:
            _read(self.path(key))
        except (FileNotFoundError, ValueError):
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


def _tensors(data: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of `data`. Raises ValueError or KeyError where it is none."""
    import torch

    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype: torch.dtype = getattr(torch, DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        count = (end - begin) // dtype.itemsize
        # An empty tensor has no byte to be a view of.
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin) if count else torch.empty(0)
        tensors[name] = flat.to(dtype).reshape(entry["shape"])
    return tensors


def _read(path: Path) -> memoryview:
    """The bytes of an entry, writable. Raises ValueError where they are not the ones that were written.

    The checksum is taken of each part while it is still near the processor; fetching everything twice from memory would
    cost as much as the checksum itself.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = np.empty(size, dtype=np.uint8).data  # not filled with zeros first
        filled = file.readinto(data[:PART])
        place = _place_of_sum(data[:filled])
        digest = _begin_sum(data[:filled], place)
        while filled < size and (count := file.readinto(data[filled : filled + PART])):
            digest.update(data[filled : filled + count])
            filled += count
    if filled < size or bytes(data[place.start : place.stop]) != digest.hexdigest().encode():
        raise ValueError("its bytes are not the ones that were written")
    return data


def _place_of_sum(data: bytes | memoryview) -> slice:
    """Where the digits of the checksum stand in the header."""
    length = int.from_bytes(data[:8], "little")
    found = SUM_IN_FILE.search(data, 8, min(8 + length, len(data)))  # a damaged length may be beyond any integer of C
    if found is None:
        raise ValueError("its header holds no checksum")
    return slice(found.start(1), found.end(1))


def _begin_sum(data: bytes | memoryview, place: slice) -> xxhash.xxh3_128:
    """xxh3 of the beginning of a file, without the digits of the checksum itself; the rest is added by `update`.

    xxh3 runs at memory speed; sha256 would make reading several times slower, and nobody attacks a local cache.
    """
    view = memoryview(data)
    digest = xxhash.xxh3_128(view[: place.start])
    digest.update(view[place.stop :])
    return digest


class Fingerprints:
    """Content hashes of files, remembered by path, size and modification time so that each is read once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "fingerprints.json"
        self._changed = False
        try:
            self._known: dict[str, list[Any]] = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # a damaged memory costs one more reading, nothing else
            self._known = {}

    def file(self, path: Path) -> str:
        """sha256 of a file's bytes. In the hub's cache a large file is a link to a blob that bears its hash as name."""
        resolved = path.resolve()
        if resolved.parent.name == "blobs" and len(resolved.name) == 64:
            return resolved.name
        stat = resolved.stat()
        known = self._known.get(str(resolved))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        with resolved.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._known[str(resolved)] = [stat.st_size, stat.st_mtime_ns, digest]
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
            write_atomic(self.path, json.dumps(self._known))
            self._changed = False
