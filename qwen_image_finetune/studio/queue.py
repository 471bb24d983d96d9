"""Starts what waits: one job after the other on each card, small work beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache

from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.studio.jobs import LOCK, STARTED, Job, Jobs, is_held, read, take
from qwen_image_finetune.studio.shelf import Refused, Shelf

ORDER = "order.json"
DESKS = 2  # jobs at a time that need no card
LONGEST_START = 15.0  # seconds in which a keeper has begun, or given up


class Queue:
    """The queue of a shelf. Everything that has to outlive the studio is on disk."""

    def __init__(self, shelf: Shelf, jobs: Jobs) -> None:
        self.shelf, self.jobs = shelf, jobs
        self.folder = shelf.own / "lanes"
        self._keepers: list[subprocess.Popen[bytes]] = []
        self._starting = threading.Lock()

    def waiting(self) -> list[Job]:
        """What waits, in the order in which it will be started."""
        told = read(self.shelf.own / ORDER) or {}
        order = {identity: place for place, identity in enumerate(told.get("order", []))}
        found = [job for job in self.jobs.all() if job.state == "waiting"]
        return sorted(found, key=lambda job: (order.get(job.id, len(order)), job.id))

    def move(self, identity: str, places: int) -> None:
        """Let a waiting job come sooner (places below 0) or later.

        Raises:
            Refused: it does not wait (any more).
        """
        with self._starting:
            order = [job.id for job in self.waiting() if job.card]
            if identity not in order:
                raise Refused("it does not wait any more", 409)
            place = order.index(identity)
            order.insert(min(max(place + places, 0), len(order) - 1), order.pop(place))
            write_atomic(self.shelf.own / ORDER, json.dumps({"order": order}))

    def withdraw(self, identity: str) -> None:
        """Take a job that waits, or has ended, off the list. What a run has written stays.

        Raises:
            Refused: it runs.
        """
        job = self.jobs.of(identity)
        lock = take(job.folder / LOCK)
        if lock is None:
            raise Refused("it runs: stop it first", 409)
        try:
            away = self.jobs.folder / f".{job.id}"
            os.rename(job.folder, away)
        finally:
            lock.release()
        shutil.rmtree(away)

    def tick(self) -> None:
        """Start what can be started now."""
        with self._starting:
            self._keepers = [keeper for keeper in self._keepers if keeper.poll() is None]
            waiting = self.waiting()
            for card in (True, False):
                line = [job for job in waiting if job.card == card]
                for lane in self._free(card)[: len(line)]:
                    self._start(line.pop(0), lane)

    def _free(self, card: bool) -> list[str]:
        names = [f"card-{number}" for number in range(num_cards())] if card else [f"desk-{n}" for n in range(DESKS)]
        self.folder.mkdir(parents=True, exist_ok=True)
        return [name for name in names if not is_held(self.folder / name)]

    def _start(self, job: Job, lane: str) -> None:
        """Start the keeper of a job, and wait until it has begun: the next look at the lane has to see it."""
        variables = dict(os.environ)
        if lane.startswith("card-") and num_cards() > 1:
            variables["CUDA_VISIBLE_DEVICES"] = cards()[int(lane.removeprefix("card-"))]
        keeper = subprocess.Popen(
            [*keeper_command(), str(job.folder), str(self.folder / lane), str(self.shelf.root)],
            cwd=self.shelf.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**variables, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C ends the studio, not the run
        )
        self._keepers.append(keeper)
        until = time.monotonic() + LONGEST_START
        while keeper.poll() is None and not (job.folder / STARTED).exists() and time.monotonic() < until:
            time.sleep(0.02)


def keeper_command() -> list[str]:
    """-P: nothing that lies in the person's folder is imported."""
    return [sys.executable, "-P", "-m", "qwen_image_finetune.studio.keeper"]


@cache
def cards() -> Sequence[str]:
    """Names by which CUDA_VISIBLE_DEVICES knows the cards of this machine; one lane where there is none."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name] or ["none"]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["none"]
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False, timeout=20).stdout
    return [
        str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))
    ] or ["none"]


def num_cards() -> int:
    """Cards of this machine; 1 where there is none."""
    return len(cards())
