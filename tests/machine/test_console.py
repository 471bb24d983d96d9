"""What a person reads while a run works."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import sys

import pytest

from qwen_image_finetune.machine import console


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the module, in seconds; set its only element."""
    time = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: time[0])
    return time


def test_rate_and_time_left_count_from_where_the_run_continued(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not from its first step: 20 of 80 steps in 10 s are 2 a second, and the other 60 take 30 s."""
    with console.progress("training", total=100, start=20) as update:
        now[0] += 10
        update(40, "loss 0.5000, 3.1 GiB")
    assert capsys.readouterr().out == "training 40/100 2.0 a second, 30 s left loss 0.5000, 3.1 GiB\n"


def test_slow_steps_are_given_in_seconds(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("drawing", total=1000) as update:
        now[0] += 50
        update(10)
    assert capsys.readouterr().out == "drawing 10/1000 5.00 s each, 1 h 22 min left\n"


def test_lines_are_few_and_the_last_one_is_never_missing(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("training", total=1000) as update:
        for step in range(1, 1001):
            now[0] += 0.1
            update(step)
    lines = capsys.readouterr().out.splitlines()
    assert 100 / console.SECONDS_BETWEEN_LINES <= len(lines) <= 100 / console.SECONDS_BETWEEN_LINES + 2
    assert lines[-1] == "training 1000/1000 10.0 a second"


def test_processes_but_the_first_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("training", total=1, shown=False) as update:
        update(1, "loss 0.5")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (90061, "25 h 01 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert console.duration(seconds) == words


@pytest.mark.parametrize(
    ("terminal", "variable", "term", "coloured"),
    [(True, "", "xterm", True), (True, "1", "xterm", False), (True, "", "dumb", False), (False, "", "xterm", False)],
)
def test_errors_are_red_where_somebody_looks(
    terminal: bool,
    variable: str,
    term: str,
    coloured: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    console.refuse("train.lr=1 is no key\n  /data/1.png: no picture; see train.lr.")
    said = capsys.readouterr().err
    bold = "\033[1m{}\033[0m".format if coloured else str
    assert said == (
        ("\033[1;31merror:\033[0m" if coloured else "error:")
        + f" {bold('train.lr')}=1 is no key\n  {bold('/data/1.png')}: no picture; see train.lr.\n"
    )


WORK = """
import time
from qwen_image_finetune.machine import console
with console.progress("training", 3) as train:
    train(1, "loss 0.9", ["loss 0.95", "lr 0.0001", "1.0 GiB", "checkpoint in 2"])
    console.say("a checkpoint is written")
    time.sleep(0.3)
    with console.progress("samples", 2) as draw:
        draw(1); draw(2)
    train(2, "loss 0.8", ["loss 0.85"])
    train(3, "loss 0.7", ["loss 0.75"])
with console.progress("another process", 1, shown=False) as quiet:
    quiet(1, "silent")
console.frame("trained", [("next", "qif report [RUN]")])
"""


def on_a_terminal(program: str, columns: int = 100, **variables: str) -> str:
    """What a program writes to a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "", **variables}
        os.execv(sys.executable, [sys.executable, "-c", program])
    said = b""
    with contextlib.suppress(OSError):  # what a terminal answers whose program is gone
        while chunk := os.read(terminal, 65536):
            said += chunk
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said.decode()
    return said.decode()


def screen(said: str) -> list[str]:
    """The lines that stay to be read: a terminal as far as carriage returns, line feeds, erasing and going up."""
    lines, row, column = [""], 0, 0
    for code, command, letter in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|([^\x1b])", said, re.DOTALL):
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif letter:
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
        elif command == "K":
            lines[row] = "" if code == "2" else lines[row][:column]
        elif command == "A":
            row -= int(code or 1)
    return [line.rstrip() for line in lines]


def test_a_terminal_has_one_live_line() -> None:
    """It says most while it lives, makes way for what is drawn inside the work, and leaves one line behind."""
    said = on_a_terminal(WORK)
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", said)
    assert re.search(r"training [━╸╺]+ 1/3 \d.* left · loss 0.95 · lr 0.0001 · 1.0 GiB · checkpoint in 2", plain)
    lines = [line for line in screen(said) if line]
    assert lines[0] == "a checkpoint is written"
    assert re.fullmatch(r"samples 2/2 [\d.]+ (a second|s each)", lines[1])
    assert re.fullmatch(r"training 3/3 [\d.]+ (a second|s each) loss 0.7", lines[2])
    assert lines[3].startswith(" ─ trained ──") and lines[4].split() == ["next", "qif", "report", "[RUN]"]
    assert len(lines) == 6 and "silent" not in plain


def test_a_narrow_terminal_keeps_what_matters_most() -> None:
    """Nothing wraps, which would scroll."""
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", on_a_terminal(WORK, columns=60))
    drawn = re.findall(r"training [━╸╺][^\r\n]*", plain)
    assert drawn and all(len(line.split("training")[1]) + 8 <= 60 for line in drawn)
    assert "loss 0.95" in plain and "checkpoint in 2" not in plain


def test_colours_and_the_live_line_are_left_out_where_they_are_not_wanted() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    assert colour.search(on_a_terminal(WORK)) and not colour.search(on_a_terminal(WORK, NO_COLOR="1"))
    assert "\x1b" not in (dumb := on_a_terminal(WORK, TERM="dumb"))
    assert dumb.splitlines()[-1] == "next  qif report [RUN]" and "training 3/3" in dumb
