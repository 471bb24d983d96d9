"""Standard output and error that never end the work that writes to them."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)  # the reader left, the terminal was closed


class Unfailing(io.TextIOBase):
    """A text stream in front of another: what that one cannot encode is escaped, what it cannot take is dropped.

    Once the reader is gone the descriptor leads nowhere, also for native code and for what Python flushes at its end.
    A full disk behind the stream only drops what does not fit: later there may be room.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(self._encodable(text))
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    @property
    def buffer(self) -> Any:
        """For programs that write bytes."""
        return self._stream.buffer

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding, self._stream.errors or "strict")
        except UnicodeEncodeError:
            return text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        return text

    def _lose(self, error: OSError) -> None:
        if error.errno in GONE:
            with suppress(OSError, io.UnsupportedOperation):
                lead_nowhere(self._stream.fileno())


def lead_nowhere(descriptor: int) -> None:
    """Let a descriptor swallow what is written to it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def unfailing(stream: TextIO | None) -> TextIO:
    """A stream that can be written to whatever happens; None is one that was closed before the process began."""
    return stream if isinstance(stream, Unfailing) else Unfailing(stream or io.StringIO())  # type: ignore[return-value]


@contextmanager
def unfailing_streams() -> Iterator[None]:
    """Around a command: no print, bar or warning of any package fails because nobody can read it any more."""
    for descriptor in (
        0,
        1,
        2,
    ):  # one that is closed would be taken by the next file, and native code would write there
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    with redirect_stdout(unfailing(sys.stdout)), redirect_stderr(unfailing(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
