"""The queue on disk: whoever is killed, nothing is started twice, nothing is lost, what runs is found again.

A job's program is a small script here, so that it can be watched; keepers, locks and processes are real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from qwen_image_finetune.studio import queue as queue_module
from qwen_image_finetune.studio.jobs import Job, Jobs, Step
from qwen_image_finetune.studio.queue import Queue
from qwen_image_finetune.studio.shelf import Refused, Shelf

# A keeper whose jobs append a line when they begin, wait for the file `go`, and end on SIGTERM as a run does.
PROGRAM = """
import signal, sys, time
from pathlib import Path
job, = map(Path, sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open("begun", "a") as file: file.write(job.name + "\\n")
print("begun", flush=True)
while not Path("go").exists(): time.sleep(0.02)
sys.exit(3 if job.joinpath("fail").exists() else 0)
"""
KEEPER = f"""
import sys
from qwen_image_finetune.studio import keeper
keeper.program = lambda verb: [sys.executable, "-c", {PROGRAM!r}]
keeper.main()
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    monkeypatch.setattr(queue_module, "keeper_command", lambda: [sys.executable, "-c", KEEPER])
    monkeypatch.setattr(queue_module, "cards", lambda: ["none"])
    before = psutil.Process().children()  # servers of this session may be among them: other tests need those
    yield Shelf(tmp_path)
    for child in psutil.Process().children():
        if child not in before:
            for process in (*child.children(recursive=True), child):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def opened(shelf: Shelf) -> Queue:
    """A studio that has just started: it knows what the disk says."""
    return Queue(shelf, Jobs(shelf))


def add(shelf: Shelf, title: str) -> Job:
    return Jobs(shelf).add("train", title, [Step("train", ["{job}"])], card=True)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def begun(shelf: Shelf) -> list[str]:
    path = shelf.root / "begun"
    return path.read_text().split() if path.exists() else []


def go(shelf: Shelf) -> None:
    (shelf.root / "go").touch()


def test_one_after_the_other_in_the_order_that_was_wanted(shelf: Shelf) -> None:
    first, second, third = (add(shelf, title) for title in ("first", "second", "third"))
    queue = opened(shelf)
    queue.tick()
    until(lambda: len(begun(shelf)) == 1)
    assert [job.state for job in (first, second, third)] == ["running", "waiting", "waiting"]
    queue.move(third.id, -1)
    with pytest.raises(Refused):
        queue.move(first.id, 1)
    queue.tick()
    assert begun(shelf) == [first.id]
    go(shelf)
    until(lambda: first.state == "done")
    until(lambda: (opened(shelf).tick(), third.state == "done")[1])  # whoever looks after the queue now
    until(lambda: (queue.tick(), second.state == "done")[1])
    assert begun(shelf) == [first.id, third.id, second.id]
    assert first.log() == "begun\n"


def test_a_studio_that_starts_again_finds_what_runs(shelf: Shelf) -> None:
    """The first studio is killed in the middle: here it is a process of its own, ended by SIGKILL."""
    first, second = add(shelf, "first"), add(shelf, "second")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom qwen_image_finetune.studio import queue as module\n"
        "from qwen_image_finetune.studio.jobs import Jobs\nfrom qwen_image_finetune.studio.shelf import Shelf\n"
        f"module.keeper_command = lambda: [sys.executable, '-c', {KEEPER!r}]\nmodule.cards = lambda: ['none']\n"
        "shelf = Shelf(Path(sys.argv[1])); module.Queue(shelf, Jobs(shelf)).tick(); time.sleep(60)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", script, str(shelf.root)])
    until(lambda: begun(shelf) == [first.id])
    server.send_signal(signal.SIGKILL)
    server.wait()
    again = opened(shelf)
    for _ in range(3):
        again.tick()
    assert first.state == "running"
    assert second.state == "waiting"
    assert begun(shelf) == [first.id]
    go(shelf)
    until(lambda: first.state == "done")
    until(lambda: (again.tick(), second.state == "done")[1])
    assert begun(shelf) == [first.id, second.id]


def test_a_killed_keeper_leaves_the_card_to_the_process_that_works(shelf: Shelf) -> None:
    job, next_one = add(shelf, "first"), add(shelf, "second")
    queue = opened(shelf)
    queue.tick()
    until(lambda: len(begun(shelf)) == 1 and job.process is not None)
    working = job.process
    assert working is not None
    keeper = psutil.Process(working).parent()
    assert keeper is not None
    keeper.kill()
    keeper.wait()
    queue.tick()
    assert psutil.pid_exists(working)
    assert job.state == "running"
    assert next_one.state == "waiting"
    os.kill(working, signal.SIGKILL)
    until(lambda: job.state == "killed")
    queue.tick()
    until(lambda: begun(shelf) == [job.id, next_one.id])
    assert next_one.state == "running"


def test_nothing_is_started_twice(shelf: Shelf) -> None:
    """Two studios, many ticks, and keepers of the same job at the same time."""
    job = add(shelf, "only one")
    keepers = [
        subprocess.Popen([sys.executable, "-c", KEEPER, str(job.folder), str(shelf.own / f"lane-{n}"), str(shelf.root)])
        for n in range(4)
    ]
    until(lambda: len(begun(shelf)) == 1)
    for _ in range(5):
        opened(shelf).tick()
    go(shelf)
    for each in keepers:
        each.wait(20)
    assert begun(shelf) == [job.id]
    assert job.state == "done"


def test_stopping_and_failing(shelf: Shelf) -> None:
    stopped, failing, gone = (add(shelf, title) for title in ("stopped", "failing", "gone"))
    queue = opened(shelf)
    queue.tick()
    until(lambda: len(begun(shelf)) == 1)
    with pytest.raises(Refused):
        queue.withdraw(stopped.id)
    stopped.stop()
    until(lambda: stopped.state == "stopped")
    (failing.folder / "fail").touch()
    queue.withdraw(gone.id)
    go(shelf)
    until(lambda: (queue.tick(), failing.state == "failed")[1])
    assert begun(shelf) == [stopped.id, failing.id]
    with pytest.raises(Refused):
        Jobs(shelf).of(gone.id)


def test_a_foreign_process_with_the_old_number_is_left_alone(shelf: Shelf) -> None:
    """Numbers of processes are used again: the time of birth tells them apart."""
    job = add(shelf, "old")
    (job.folder / "process.json").write_text(f'{{"pid": {os.getpid()}, "born": 12345.0}}')
    assert job.process is None
    job.stop()  # would end this very test


def test_work_that_needs_no_card_runs_beside(shelf: Shelf) -> None:
    add(shelf, "training")
    beside = Jobs(shelf).add("look", "looking", [Step("look", ["{job}"])])
    opened(shelf).tick()
    until(lambda: len(begun(shelf)) == 2)
    assert beside.state == "running"


def test_a_job_of_a_strange_verb_is_not_run(shelf: Shelf) -> None:
    """A folder from somewhere else may hold jobs: a verb is one of a few, never a command."""
    from qwen_image_finetune.studio import keeper

    for verb in ("rm", "../../bin/sh", "tiny", ""):
        with pytest.raises(AssertionError):
            keeper.program(verb)
