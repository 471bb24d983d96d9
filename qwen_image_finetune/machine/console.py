"""What a person sees while work goes on: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from qwen_image_finetune.machine import journal
from qwen_image_finetune.machine.streams import unfailing

SECONDS_BETWEEN_LINES = 10.0


class Update(Protocol):
    """Called with what is done so far and a short text, such as the loss."""

    def __call__(self, done: int, text: str = "") -> None: ...


def say(message: str, stream: TextIO | None = None) -> None:
    """One line for the person who started the command, on standard output by default; never fails, read or not."""
    print(message, file=unfailing(stream or sys.stdout), flush=True)
    journal.write(message)


def refuse(message: str) -> None:
    """An error, on standard error; its first word is red on a terminal, unless NO_COLOR asks for none."""
    stream = unfailing(sys.stderr)
    coloured = stream.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[1;31merror:\033[0m {message}" if coloured else f"error: {message}", file=stream, flush=True)
    journal.write(f"error: {message}")


def note(message: str, stream: TextIO | None = None) -> None:
    """A line for whoever started the run, once however many processes there are; on standard output by default."""
    if os.environ.get("RANK", "0") == "0":
        say(f"note: {message}", stream)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the small ones left out where they do not matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextmanager
def progress(title: str, total: int, start: int = 0, shown: bool = True) -> Iterator[Update]:
    """Progress with rate and time left.

    Args:
        start: what was done before (a resumed run), so that the rate counts only what is done now.
        shown: False keeps quiet, for all processes but the first.
    """
    if not shown:
        yield lambda done, text="": None
    elif sys.stdout is not None and sys.stdout.isatty():
        with _bar(title, total, start) as update:
            yield update
    else:
        yield _lines(title, total, start, say)


@contextmanager
def _bar(title: str, total: int, start: int) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    log = _lines(title, total, start, journal.write)  # where a bar would be no use
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=unfailing(sys.stdout))
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console) as bars:
        task = bars.add_task(title, total=total, completed=start, text="")
        rate = _Rate(total, start)

        def update(done: int, text: str = "") -> None:
            bars.update(task, completed=done, text=f"{rate.words(done)} {text}")
            log(done, text)

        yield update


def _lines(title: str, total: int, start: int, tell: Callable[[str], None]) -> Update:
    rate, last = _Rate(total, start), 0.0

    def update(done: int, text: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES or done == total:
            last = time.monotonic()
            tell(f"{title} {done}/{total} {rate.words(done)} {text}".rstrip())

    return update


class _Rate:
    """Speed since the start, and what it means for the rest."""

    def __init__(self, total: int, start: int) -> None:
        self.total, self.start, self.began = total, start, time.monotonic()

    def words(self, done: int) -> str:
        seconds = (time.monotonic() - self.began) / max(done - self.start, 1)
        speed = f"{seconds:.2f} s each" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.1f} a second"
        left = duration(seconds * (self.total - done))
        return f"{speed}, {left} left" if done < self.total else speed
