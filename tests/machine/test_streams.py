"""Nobody who reads, or stops reading, what a command says can end it; its log has every line."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_image_finetune.disk import history, runs, versions
from qwen_image_finetune.disk.files import append_line
from qwen_image_finetune.machine import console, journal
from qwen_image_finetune.machine.signals import StopSignals
from qwen_image_finetune.machine.streams import Unfailing

ROOT = Path(__file__).parents[2]

# A command that says much, by our own means and by those of others, and leaves a file once all is said.
TALKS = """
import argparse, pathlib, sys
from qwen_image_finetune.command import cli
from qwen_image_finetune.machine import console

def talk(options):
    for number in range(3000):
        console.say(f"line {number} é \\ud800")
        print("from elsewhere é", flush=True)
        print("warning é", file=sys.stderr)
    with console.progress("work", 2) as update:
        update(2, "é")
    pathlib.Path(sys.argv[1]).touch()

sys.exit(cli.guarded(talk, argparse.Namespace()))
"""


def talking(done: Path, shell: str = "", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TALKS, str(done)]
    if shell:
        command = ["bash", "-c", f'exec "$@" {shell}', "bash", *command]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    process = talking(tmp_path / "done", "2>&1")
    assert process.stdout is not None and process.stdout.readline().startswith("line 0")
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr is not None and process.stderr.read() == ""
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("shell", ["2>/dev/full", ">/dev/full", ">&-", ">&- 2>&- <&-"])
def test_a_full_disk_behind_it_and_streams_that_are_closed(shell: str, tmp_path: Path) -> None:
    process = talking(tmp_path / "done", shell)
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "done").exists()


def test_what_cannot_be_encoded_is_escaped(tmp_path: Path) -> None:
    said, warned = talking(tmp_path / "done", PYTHONIOENCODING="ascii").communicate(timeout=60)
    assert said.splitlines()[:2] == ["line 0 \\xe9 \\ud800", "from elsewhere \\xe9"]
    assert warned.splitlines()[0] == "warning \\xe9" and (tmp_path / "done").exists()


class _Terminal(io.StringIO):
    """One that was closed: every write fails as the kernel's does."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_was_closed_takes_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Terminal())
    kept: list[str] = []
    with journal.recording():
        journal.keep_in(kept.append)
        with console.progress("training", 2) as update:
            update(1)
            update(2, "loss 0.5")
    assert kept[-1].endswith("loss 0.5\n") and "training 2/2" in kept[-1]
    assert Unfailing(sys.stdout).write("é") == 1


def test_the_log_has_every_line_with_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those from before there was a version, and what ended the run."""
    with pytest.raises(versions.RunError), journal.recording():
        console.note("before there is a version", sys.stderr)
        with journal.recording():
            console.say("two\nlines é")
            run = runs.claim_version(tmp_path / "project")
            journal.keep_in(run.log)
        console.say("more")
        raise versions.RunError("the end")
    run.close()
    console.say("nobody keeps this")
    lines = (run.path / history.LOG).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    said = ["note: before there is a version", "two", "lines é", "more", "error: the end"]
    assert [line[20:] for line in lines] == said
    assert "note: before" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    run = runs.claim_version(tmp_path / "project")
    (run.path / history.LOG).symlink_to("/dev/full")
    with pytest.raises(OSError):
        append_line(run.path / history.LOG, "a line\n")
    run.log("a line\n")
    run.record(1, {"loss": 1.0})
    run.close()
    assert [line["step"] for line in history.read_metrics(run.path)] == [1]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_stops_a_run_unless_nohup_says_no(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopSignals() as stopping:
            stopping.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.received == (0 if ignored else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
