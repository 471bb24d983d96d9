"""Files that are either whole or not there: atomic writes, staged folders, manifests.

Nothing is ever written under its final name. A file or folder grows under a hidden name beside it, is flushed to the
disk, and is then renamed, which a file system does at once or not at all. A process killed at any moment therefore
leaves hidden leftovers at worst, and `clean_leftovers` knows them by name. POSIX only (flushing of folders).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NewType

from qwen_image_finetune.disk import manifest
from qwen_image_finetune.disk.locks import FileLock

LEFTOVER = re.compile(r"^\.(?P<name>.+)\.(?P<kind>partial|trash|replaced)-\d+-[0-9a-f]{8}$")
LONGEST_NAME = 220  # bytes: disks take 255, of which a staged file needs some for its hidden name
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_IN_RUST = tuple(f"(os error {code})" for code in _NO_SPACE)  # how safetensors words the same errors


class DiskFull(OSError):
    """No space left on the disk (or within the quota) for a file or folder; nothing half-written stays."""

    def __init__(self, path: Path, needed: int | None = None) -> None:
        """
        Args:
            needed: bytes of the file or folder; None where only its writer knows.
        """
        free = _megabytes(shutil.disk_usage(path.parent).free)
        wanted = f"more than the {free} that are free" if needed is None else f"{_megabytes(needed)}, {free} are free"
        super().__init__(
            errno.ENOSPC,
            f"no space left to write {path}: it needs {wanted}; what was saved before is intact. Free some space, or "
            "choose a folder on a larger disk",
        )
        self.path, self.needed = path, needed


Staged = NewType("Staged", Path)  # a hidden name that becomes the final one: the only place that others may write to


class FolderError(ValueError):
    """A folder of the configuration that nothing can be written into."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one, whatever happens.

    Raises:
        DiskFull: no space is left; `path` is as it was.
        OSError: the folder is missing or cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    with staged_file(path, len(content)) as partial:
        partial.write_bytes(content)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file with a single write, so that a killed process leaves whole lines.

    Raises:
        DiskFull: no space is left; no part of the line stays.
    """
    data = line.encode(errors="backslashreplace")
    with _descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFull(path, len(data)) from error
            raise
        if written < len(data):
            os.ftruncate(descriptor, size)
            raise DiskFull(path, len(data))


def flush_file(path: Path) -> None:
    """Bring what was written to a file to the disk."""
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


def short_name(stem: str, ending: str) -> str:
    """`stem` and `ending` as the name of a file, the stem cut where a disk would refuse its length in bytes."""
    room = LONGEST_NAME - len(os.fsencode(ending))
    return os.fsencode(stem)[:room].decode(errors="ignore") + ending


@contextmanager
def staged_file(final: Path, needed: int | None = None) -> Iterator[Staged]:
    """Yield a hidden name beside `final` to write a file under; it becomes `final` when the block ends.

    If the block raises, the hidden file is removed and `final` is as it was. Where `final` is a link, the file that it
    leads to is written, as by any program.

    Args:
        needed: bytes that will be written, if known, for the message about a full disk.

    Raises:
        DiskFull: no space is left; `final` is as it was.
        OSError: the folder is missing or cannot be written.
    """
    final = final.resolve() if final.is_symlink() else final
    partial = hidden(final, "partial")
    try:
        partial.touch()
        mode = _mode(partial)  # what the umask gives; a writer may put a file of its own in its place
        yield Staged(partial)
        partial.chmod(mode)
        flush_file(partial)
        os.replace(partial, final)
    except Exception as error:  # as in `staged_folder`
        if is_disk_full(error):
            raise DiskFull(final, needed) from error
        raise
    finally:
        partial.unlink(missing_ok=True)  # gone already where all went well
    sync_folder(final.parent)


@contextmanager
def staged_folder(final: Path, needed: int = 0, sealed: bool = True) -> Iterator[Staged]:
    """Yield a hidden folder beside `final` to write into; it becomes `final`, with a manifest, when the block ends.

    An older folder of that name stays in place until the new one is complete. If the block raises, the hidden
    folder is removed and `final` is as it was. One process at a time may write a given `final`.

    Args:
        final: the folder to be; its parent exists.
        needed: bytes that will be written, if known: a disk too small for them is refused before the first one.
        sealed: off, there is no manifest: for folders whose content is laid down by others.

    Raises:
        DiskFull: no space is left.
    """
    if shutil.disk_usage(final.parent).free < needed:
        raise DiskFull(final, needed)
    stage, replaced = hidden(final, "partial"), hidden(final, "replaced")
    try:
        stage.mkdir()
        yield Staged(stage)
        _finish(stage, final.name if sealed else None)
        if final.is_dir():
            os.rename(final, replaced)  # a crash right here is undone by clean_leftovers
        os.rename(stage, final)
    except Exception as error:  # whatever was raised goes on its way, only a full disk is said in clearer words
        if is_disk_full(error):
            raise DiskFull(final, max(needed, _size(stage))) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # gone already where all went well
    sync_folder(final.parent)
    if replaced.is_symlink():  # what it leads to is not ours to remove
        replaced.unlink()
    shutil.rmtree(replaced, ignore_errors=True)


def check_writable(folder: Path, key: str) -> None:
    """Make `folder` where it is not there, and try it out: a file, its lock, and its removal.

    Args:
        key: the configuration key that named it.

    Raises:
        FolderError: it cannot be made, written or locked.
    """
    probe = hidden(folder / "probe", "partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            FileLock(probe, wait=False).release()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise FolderError(
            f"{key}={folder}: {error.strerror or error}; it must name a folder that can be made and written, on a "
            "file system with locks"
        ) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a crash half-way never leaves something that looks like it."""
    trash = hidden(folder, "trash")
    os.rename(folder, trash)
    sync_folder(folder.parent)
    shutil.rmtree(trash)


def clean_leftovers(folder: Path) -> None:
    """Remove what killed processes left in `folder`, and put back a folder whose replacement never arrived.

    Only for folders in which no other process writes: the caller holds their lock.
    """
    for path in sorted(folder.iterdir()):
        found = LEFTOVER.match(path.name)
        if found is None:
            continue
        original = folder / found["name"]
        if found["kind"] == "replaced" and not original.exists():
            os.rename(path, original)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def hidden(path: Path, kind: str) -> Path:
    """A name beside `path` that no reader looks at, and that no other process or thread takes."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def is_disk_full(error: Exception) -> bool:
    """Whether an exception says that the disk, or the quota, is full; safetensors says it in words alone."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return any(words in str(error) for words in _NO_SPACE_IN_RUST)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder: without it a rename may be lost when the power fails."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finish(stage: Path, name: str | None) -> None:
    """Flush every file of a stage; with a `name`, write the manifest last: a folder with a manifest is complete."""
    if name is not None:
        text = manifest.of_folder(stage, name).text()
        (stage / manifest.MANIFEST).write_bytes(text)
    _open_to_umask(stage)
    for path in stage.rglob("*"):
        flush_file(path)
    sync_folder(stage)


def _mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def _open_to_umask(folder: Path) -> None:
    """Give every file in a folder the mode that the umask gives: safetensors writes files for their owner alone.

    A file that has another name as well, a hard link, is somebody's own and keeps its mode.
    """
    probe = hidden(folder / "probe", "partial")
    probe.touch()
    mode = _mode(probe)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            path.chmod(mode)


@contextmanager
def _descriptor(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _megabytes(size: int) -> str:
    return f"{size:,} bytes" if size < 10_000_000 else f"{size / 1e6:,.0f} MB"
