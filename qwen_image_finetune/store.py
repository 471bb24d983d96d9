"""Encoded tensors on disk, keyed by content and settings.

One entry is one safetensors file, named by the hash of everything that decides its value: the bytes of the source
files, crop and size, the prompt, the weights of the encoder and their precision. So a change of any of these misses,
nothing else does, and entries can be shared by runs, data sets and processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from qwen_image_finetune.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # part of every key: raise it when the meaning of stored tensors changes


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
        body = save(contiguous)
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(contiguous, metadata={"xxh3": _checksum(body)}))

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU.

        Raises:
            DamagedEntry: the file is cut short, has flipped bytes or is not ours.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(key)
        data = path.read_bytes()
        try:
            if not _intact(data):
                raise DamagedEntry(f"{path} is damaged: its bytes are not the ones that were written")
            return load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise DamagedEntry(f"{path} is damaged: {error}") from error

    def verify(self, key: str) -> bool:
        """Whether an entry is there and undamaged."""
        try:
            return _intact(self.path(key).read_bytes())
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def discard(self, key: str) -> None:
        """Remove an entry, if there is one."""
        self.path(key).unlink(missing_ok=True)


def _checksum(data: bytes | memoryview, header: str = "") -> str:
    """xxh3 of the tensors' bytes and of what the header says about them.

    xxh3 runs at memory speed; sha256 would make reading several times slower, and nobody attacks a local cache.
    """
    if not header:
        length = int.from_bytes(data[:8], "little")
        header, data = _canonical_header(bytes(data[8 : 8 + length])), memoryview(data)[8 + length :]
    digest = xxhash.xxh3_128(header.encode())
    digest.update(data)
    return digest.hexdigest()


def _canonical_header(raw: bytes) -> str:
    header = json.loads(raw)
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True)


def _intact(data: bytes) -> bool:
    """Whether the checksum in the header fits header and tensors. Raises ValueError or KeyError where there is none."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length:
        return False
    raw = data[8 : 8 + length]
    written: str = json.loads(raw)["__metadata__"]["xxh3"]
    return written == _checksum(memoryview(data)[8 + length :], _canonical_header(raw))


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
