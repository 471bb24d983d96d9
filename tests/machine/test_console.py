"""What a person reads while a run works."""

from __future__ import annotations

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
    ("terminal", "variable", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_errors_are_red_where_somebody_looks(
    terminal: bool, variable: str, coloured: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    console.refuse("train.lr=1 is no key")
    said = capsys.readouterr().err
    assert said == ("\033[1;31merror:\033[0m" if coloured else "error:") + " train.lr=1 is no key\n"
