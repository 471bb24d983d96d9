"""What a person sees while work goes on: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

from qwen_image_finetune.machine import journal, terminal
from qwen_image_finetune.machine.streams import unfailing

SECONDS_BETWEEN_LINES = 10.0
LEADING = re.compile(r"^(\s*)('?[A-Za-z_][\w]*(?:\.\w+)+'?(?==|\b)|/\S+(?=:))")  # a key, or a file


class Update(Protocol):
    """Called with what is done so far and a short text, such as the loss.

    `live` is what a terminal shows in place of the text, the most important first: a line that is drawn anew for every
    step may say more than one that stays.
    """

    def __call__(self, done: int, text: str = "", live: Sequence[str] = ()) -> None: ...


def say(message: str, stream: TextIO | None = None) -> None:
    """One line for the person who started the command, on standard output by default; never fails, read or not."""
    print(message, file=unfailing(stream or sys.stdout), flush=True)
    journal.write(message)


def refuse(message: str) -> None:
    """An error, on standard error. On a terminal in colour, the key that it is about first to be seen."""
    stream = unfailing(sys.stderr)
    words = _coloured(message) if terminal.is_coloured(stream) else f"error: {message}"
    print(words, file=stream, flush=True)
    journal.write(f"error: {message}")


def _coloured(message: str) -> str:
    """The word `error` red, and at the start of a line a key of the configuration, or a file, bold."""
    lines = [LEADING.sub(lambda found: f"{found[1]}\033[1m{found[2]}\033[0m", line) for line in message.split("\n")]
    return "\033[1;31merror:\033[0m " + "\n".join(lines)


def frame(title: str, rows: Sequence[tuple[str, str]], shown: bool = True) -> None:
    """A summary: on a terminal in a frame, elsewhere a line for each row.

    Args:
        rows: (name, what is said of it).
        shown: False keeps quiet, for all processes but the first.
    """
    if not shown:
        return
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {words}" for name, words in rows]
    if not terminal.is_terminal(sys.stdout):
        for line in lines:
            say(line)
        return
    from rich import box
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for name, words in rows:
        table.add_row(Text(name, "bold"), Text(words, overflow="fold"))
    # No upright lines: a command that takes several lines is copied without them.
    panel = Panel(table, box.HORIZONTALS, title=Text(title), title_align="left", border_style="green")
    terminal.screen(sys.stdout).print(panel)
    for line in lines:
        journal.write(line)


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
        yield lambda done, text="", live=(): None
    elif terminal.is_terminal(sys.stdout):
        with _bar(title, total, start) as update:
            yield update
    else:
        yield _lines(title, total, start, say)


@contextmanager
def _bar(title: str, total: int, start: int) -> Iterator[Update]:
    log = _lines(title, total, start, journal.write)  # where a bar would be no use
    rate, last = _Rate(total, start), ""
    with terminal.line(title, total, start) as redraw:

        def update(done: int, text: str = "", live: Sequence[str] = ()) -> None:
            nonlocal last
            redraw(done, [rate.words(done), *(live or [text])])
            log(done, text)
            last = f"{title} {done}/{total} {rate.words(done)} {text}".rstrip() if done == total else ""

        yield update
        if last:  # what is over is one line among the others
            print(last, file=unfailing(sys.stdout), flush=True)


def _lines(title: str, total: int, start: int, tell: Callable[[str], None]) -> Update:
    rate, last = _Rate(total, start), 0.0

    def update(done: int, text: str = "", live: Sequence[str] = ()) -> None:
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
