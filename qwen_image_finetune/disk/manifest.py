"""The manifest of a folder: which files were written, as what the folder was written, and a checksum of all of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_image_finetune.disk.reading import MEBIBYTE, Unreadable, read_regular

MANIFEST = "manifest.json"
LIMIT = 64 * MEBIBYTE  # a few hundred thousand files


@dataclass(frozen=True)
class Manifest:
    """What a folder held when it was written."""

    files: dict[str, tuple[int, str]]  # size and SHA-256 by path below the folder
    name: str | None  # of the folder; None in folders of before it was kept

    def text(self) -> bytes:
        """The one spelling of a manifest. It holds its own checksum, so that no byte of it can change unnoticed."""
        files: dict[str, Any] = {path: {"size": size, "sha256": sum_} for path, (size, sum_) in self.files.items()}
        summed = files if self.name is None else {"files": files, "name": self.name}
        own = hashlib.sha256(json.dumps(summed, sort_keys=True).encode()).hexdigest()
        named = {} if self.name is None else {"name": self.name}
        return (json.dumps({"files": files, "sha256": own, **named}, indent=1, sort_keys=True) + "\n").encode()


def of_folder(folder: Path, name: str) -> Manifest:
    """The manifest of the files that are in a folder now, which will be called `name`.

    Raises:
        ValueError: it holds something else than files and folders.
    """
    files: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder; only these can be kept")
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = (path.stat().st_size, _checksum(path))
    return Manifest(files, name)


def verify_folder(folder: Path, checksums: bool = True) -> str | None:
    """None where every file of the manifest is there as it was written, else a sentence that says what is wrong.

    Files beside those of the manifest are nobody's business. With `checksums` off, only presence and sizes are
    compared: enough to tell a complete folder from an unfinished one, as folders appear whole or not at all.
    """
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        text = read_regular(folder / MANIFEST, LIMIT)
    except OSError as error:
        return f"{folder} has no readable {MANIFEST} ({error.strerror})"
    except Unreadable as error:
        return str(error)
    manifest = _parsed(text)
    if manifest is None:
        return f"{folder / MANIFEST} is damaged"
    for name, (size, checksum) in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
            return f"{path} is a link or lies outside its folder"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is damaged: {path.stat().st_size} bytes instead of {size}"
        if checksums and _checksum(path) != checksum:
            return f"{path} is damaged: its checksum differs from the one in {MANIFEST}"
    return None


def written_as(folder: Path) -> str | None:
    """The name that a folder, which `verify_folder` found whole, was written under; None where that was not kept."""
    manifest = _parsed(read_regular(folder / MANIFEST, LIMIT))
    return None if manifest is None else manifest.name


def holds(folder: Path, path: Path) -> bool:
    """Whether a file is one of those that the manifest of a folder names, or the manifest itself.

    Raises:
        OSError, Unreadable: there is no manifest.
    """
    found = _parsed(read_regular(folder / MANIFEST, LIMIT))
    name = path.relative_to(folder).as_posix()
    return found is not None and (name == MANIFEST or name in found.files)


def _parsed(text: bytes) -> Manifest | None:
    """None where a byte is not as `Manifest.text` writes it."""
    try:
        found = json.loads(text)
        files = {str(path): (int(entry["size"]), str(entry["sha256"])) for path, entry in found["files"].items()}
        manifest = Manifest(files, None if found.get("name") is None else str(found["name"]))
        again = manifest.text()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    outside = any(PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts for path in files)
    return None if outside or again != text else manifest


def _checksum(path: Path) -> str:
    """SHA-256. Slower than xxh3 (about 1 GB/s a core), but in the standard library, checkable with `sha256sum`, and
    it runs in the background thread that writes, or once before a resume that reads the same bytes anyway."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
