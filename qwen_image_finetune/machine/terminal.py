"""One line at the foot of a terminal that is drawn again and again; what is said meanwhile scrolls by above it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from qwen_image_finetune.machine.streams import unfailing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

BAR, NARROWEST_BAR = 28, 8  # columns


class Redraw(Protocol):
    """Called with what is done so far and what is said of it, the most important first."""

    def __call__(self, done: int, parts: Sequence[str]) -> None: ...


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at it, at a terminal that can do more than print line below line (TERM is not dumb)."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def is_coloured(stream: TextIO | None) -> bool:
    """The same, and colours are wanted (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def screen(stream: TextIO) -> Console:
    """rich's console on a stream that never fails."""
    from rich.console import Console

    return Console(file=unfailing(stream), highlight=False, no_color=not is_coloured(stream))


class _Line:
    """A piece of work: its title, how far it is, and what is said of it."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done, self.parts = title, total, done, [""]

    def render(self, width: int) -> Table:
        """As much of it as fits into `width` columns: the last parts go first, then the bar is shortened."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head, count = Text(self.title, "bold"), Text(f"{self.done:,}/{self.total:,}", "green")
        room = width - head.cell_len - count.cell_len - 3
        parts = [part for part in self.parts if part]
        while parts and Text(" · ".join(parts)).cell_len + NARROWEST_BAR > room:
            parts.pop()
        tail = Text(" · ".join(parts), "cyan")
        bar = max(min(BAR, room - tail.cell_len), 1)
        line = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(4):
            line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(head, ProgressBar(self.total, self.done, width=bar), count, tail)
        return line


_open: list[_Line] = []  # one work inside another, such as samples within training: the innermost is shown
_live: list[Live] = []  # one at most: a terminal has one foot


@contextmanager
def line(title: str, total: int, start: int) -> Iterator[Redraw]:
    """A live line on standard output for the time of the block; it is gone afterwards, its place with it."""
    mine = _Line(title, total, start)
    _open.append(mine)
    try:
        with _foot() as live:

            def redraw(done: int, parts: Sequence[str]) -> None:
                mine.done, mine.parts = done, list(parts)
                live.refresh() if done >= total else None

            yield redraw
    finally:
        _open.remove(mine)


@contextmanager
def _foot() -> Iterator[Live]:
    """The live display, which the outermost line opens and closes."""
    from rich.live import Live

    if _live:
        yield _live[0]
        return
    console = screen(sys.stdout)
    live = Live(console=console, refresh_per_second=8, transient=True,
                get_renderable=lambda: _open[-1].render(console.width) if _open else "")  # fmt: skip
    with live:
        _live.append(live)
        try:
            yield live
        finally:
            _live.clear()
