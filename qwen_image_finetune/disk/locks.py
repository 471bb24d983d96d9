"""Locks between processes that the kernel drops when their owner ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import ClassVar


class FileLock:
    """An flock(2) on a file, exclusive unless `shared`, held from construction to `release` or the end of the process.

    Forked children let go of their copy at once: a data worker that outlives a killed trainer holds nothing.
    On network file systems the server must support flock.
    """

    held: ClassVar[set[FileLock]] = set()

    def __init__(self, path: Path, wait: bool, shared: bool = False) -> None:
        """Raises BlockingIOError where another owner holds it and `wait` is off, OSError where it cannot be made."""
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(self.descriptor)
            raise
        FileLock.held.add(self)

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self in FileLock.held:
            FileLock.held.discard(self)
            os.close(self.descriptor)

    def write(self, text: str) -> None:
        """Replace the content of the locked file, for people who wonder who holds it."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text.encode(), 0)


def _release_all() -> None:
    for lock in list(FileLock.held):
        lock.release()


os.register_at_fork(after_in_child=_release_all)  # closing the child's copy leaves the parent's lock in place
