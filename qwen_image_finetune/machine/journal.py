"""What is said while a run goes on, kept for its log: from the first line on, whether or not anybody reads it."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST_LINES = 10_000  # that wait for a log


class Journal:
    """Lines with their time, which wait until there is a place for them."""

    def __init__(self) -> None:
        self._waiting: deque[str] = deque(maxlen=MOST_LINES)
        self._keep: Callable[[str], None] = self._waiting.append

    def write(self, message: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in message.splitlines():
            self._keep(f"{stamp} {line}\n")

    def keep_in(self, keep: Callable[[str], None]) -> None:
        """From here on every line goes to `keep`; those that waited go first."""
        self._keep = keep
        while self._waiting:
            keep(self._waiting.popleft())


_open: list[Journal] = []  # one at most: runs of one process follow each other


@contextmanager
def recording() -> Iterator[Journal]:
    """Around a run: what is said in the block is kept, and what ended it is. Inside another block, that one goes on."""
    if _open:
        yield _open[0]
        return
    _open.append(Journal())
    try:
        yield _open[0]
    except Exception as error:
        ours = type(error).__module__.startswith("qwen_image_finetune")  # says what is wrong by itself
        write(f"error: {error}" if ours else "".join(traceback.format_exception(error)))
        raise
    finally:
        _open.clear()


def write(message: str) -> None:
    """Keep a message, where a run is recorded."""
    for journal in _open:
        journal.write(message)


def keep_in(keep: Callable[[str], None]) -> None:
    """The run that is recorded has a place for its lines now, each of which ends in a line break."""
    for journal in _open:
        journal.keep_in(keep)
