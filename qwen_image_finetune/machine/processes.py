"""The processes of a run: where they wait for each other, and who holds them up.

Processes wait in two ways. Within a step they meet in collectives, which torch.distributed ends after
train.collective_timeout seconds, so that a process that hangs ends the run. Around work that takes some processes much
longer than others (encoding, samples, checkpoints, loading) they meet in the key-value store of torch.distributed,
with no collective pending: nothing times out there because one of them had more to do.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from qwen_image_finetune.machine import console

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PATIENCE = 24 * 3600.0  # seconds that long work may take; a process that dies meanwhile ends the run at once anyway
START_TIMEOUT = timedelta(minutes=30)  # for collectives before and in the first step: imports, kernels, compilation
LINGER = 10.0  # seconds that the first process waits for the others to have heard
POLL = 0.05  # seconds between two looks at the store
SECONDS_BETWEEN_LINES = 60.0  # about somebody who is waited for
SCHEME = "qif-attempt"
_numbers = itertools.count()  # of meetings: every process counts the same ones


class ProcessLost(RuntimeError):
    """Another process of the run does not come."""


# The group


@cache
def fresh_start() -> str:
    """The `init_method` of this run's process group: env://, with keys of each attempt of torchrun apart.

    torchrun keeps one store for all its attempts. Without this, a restarted process finds the addresses of processes
    that are gone, and meetings that their predecessors completed.
    """
    from torch.distributed.rendezvous import register_rendezvous_handler

    register_rendezvous_handler(SCHEME, _attempt)
    return f"{SCHEME}://"


def _attempt(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for store, rank, size in rendezvous("env://", **options):
        yield PrefixStore(f"attempt-{attempt}", store), rank, size


# Together


class Team:
    """The processes of a run as one of them sees them. Alone, it waits for nobody."""

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self.main = rank == 0
        self._store: Store | None = None
        self._place = (0, "starting")  # how many places were entered so far, and which is the last
        if size > 1:
            from torch.distributed.distributed_c10d import _get_default_store

            self._store = _get_default_store()

    def meet(self, what: str) -> None:
        """Wait until all processes are here, without a collective.

        Args:
            what: they come from, for messages.

        Raises:
            ProcessLost: one did not come in time; names it.
        """
        if self._store is None:
            return
        key = f"qif/meeting/{next(_numbers)}"
        self._store.set(f"{key}/{self.rank}", what)
        if self._store.add(key, 1) == self.size:
            self._store.set(f"{key}/complete", what)
        self._wait(f"{key}/complete", what, [f"{key}/{rank}" for rank in range(self.size)])
        # Started without a launcher that keeps the store (srun, mpirun), the first process does: were it to end now,
        # whoever still asks whether the meeting is complete would fail at the end of a run that succeeded.
        left, began = self._store.add(f"{key}/left", 1), time.monotonic()
        while self.main and left < self.size and time.monotonic() - began < LINGER:
            time.sleep(POLL)
            left = self._store.add(f"{key}/left", 0)

    def share(self, make: Callable[[], Any], what: str) -> Any:
        """What `make` returns in the first process (JSON types), in all of them."""
        if self._store is None:
            return make()
        key = f"qif/shared/{next(_numbers)}"
        if self.main:
            self._store.set(key, json.dumps(make()))
        self._wait(key, what, [])
        return json.loads(self._store.get(key))

    def _wait(self, key: str, what: str, signatures: list[str]) -> None:
        assert self._store is not None
        began = reported = time.monotonic()
        while not self._store.check([key]):
            time.sleep(POLL)
            now = time.monotonic()
            if now - began < PATIENCE and now - reported < SECONDS_BETWEEN_LINES:
                continue
            absent = [rank for rank, name in enumerate(signatures) if not self._store.check([name])] or [0]
            late = f"process {', '.join(map(str, absent))}"
            if now - began >= PATIENCE:
                raise ProcessLost(f"{what}: process {self.rank} waited {console.duration(PATIENCE)} for {late}")
            reported = now
            if self.rank == min(set(range(self.size)) - set(absent), default=0):
                console.say(f"{what}: waiting for {late}")

    # Who holds the others up

    def enter(self, place: str) -> None:
        """Note where this process is. All processes enter the same places in the same order."""
        self._place = (self._place[0] + 1, place)

    @contextmanager
    def watched(self, limit: float) -> Iterator[None]:
        """Say which process the others wait for, and where it is, once they have waited most of `limit` seconds.

        Ends nothing itself: that is for the timeout of the collectives. Their message, however, names the process
        that waited, never the one that did not come.
        """
        if self._store is None:
            yield
            return
        end = threading.Event()
        # A connection of its own: the other one is busy while torch.distributed waits.
        watch = _Watch(self, self._store.clone(), 0.7 * limit)
        thread = threading.Thread(target=watch.run, args=(end,), name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join(timeout=5)


class _Watch:
    """Tells the others where this process is, and the person if somebody is far behind."""

    def __init__(self, team: Team, store: Store, limit: float) -> None:
        self.team, self.store, self.limit = team, store, limit
        now, everybody = time.monotonic(), range(team.size)
        # process -> (places entered, the last, beats of its watch)
        self.seen: dict[int, tuple[int, str, int]] = dict.fromkeys(everybody, (-1, "starting", 0))
        # process -> when it came to its place, when its last beat was seen
        self.since: dict[int, list[float]] = {rank: [now, now] for rank in everybody}
        self.reported = -1  # places entered when somebody was last reported

    def run(self, end: threading.Event) -> None:
        beat = 0
        while not end.wait(1.0):
            beat += 1
            try:
                self.store.set(f"qif/at/{self.team.rank}", json.dumps([*self.team._place, beat]))
                self._look()
            except RuntimeError:  # the store is gone: so is its process, and the run with it
                return
            message = self._report()
            if message:
                console.say(message)

    def _look(self) -> None:
        now = time.monotonic()
        for rank in range(self.team.size):
            name = f"qif/at/{rank}"
            if self.store.check([name]):
                count, place, beat = json.loads(self.store.get(name))
                if self.seen[rank][0] != count:
                    self.since[rank][0] = now
                if self.seen[rank][2] != beat:
                    self.since[rank][1] = now
                self.seen[rank] = (count, place, beat)

    def _report(self) -> str | None:
        """A sentence, once for each place where this process is kept waiting, or keeps others."""
        now, rank = time.monotonic(), self.team.rank
        counts = {other: seen[0] for other, seen in self.seen.items()}
        waits = now - self.since[rank][0]
        if waits < self.limit or self.reported == counts[rank]:
            return None
        last = min(counts.values())
        if last == max(counts.values()):
            return None  # all are at the same place: slow, but together
        self.reported = counts[rank]
        if counts[rank] == last:
            faulthandler.dump_traceback(file=sys.stderr)
            return f"process {rank} holds the others up: for {waits:.0f} s it has been {self.seen[rank][1]}"
        late = [
            f"process {other}, {'silent' if now - self.since[other][1] > 5 else self.seen[other][1]} "
            f"for {now - self.since[other][0]:.0f} s"
            for other, count in counts.items()
            if count == last
        ]
        return f"process {rank} has waited {waits:.0f} s ({self.seen[rank][1]}) for {'; '.join(late)}"


_failed = False


def abandon() -> None:
    """A run failed: the process ends without taking leave, for which torch.distributed would wait for the others."""
    global _failed  # noqa: PLW0603
    _failed = True


def leave() -> None:
    """At the end of the process: let go of torch.distributed. Not sooner, as a process may run several runs."""
    import torch.distributed

    if torch.distributed.is_initialized() and not _failed:
        torch.distributed.destroy_process_group()


def set_timeout(limit: timedelta) -> None:
    """How long torch.distributed lets a collective wait, from now on; nothing where there is one process."""
    import torch.distributed
    from torch.distributed import distributed_c10d

    if torch.distributed.is_initialized():
        # Public since torch 2.14; torch 2.9 to 2.13 have it under its older name, which newer ones warn about.
        change = vars(torch.distributed).get("set_timeout") or distributed_c10d._set_pg_timeout
        change(limit)
