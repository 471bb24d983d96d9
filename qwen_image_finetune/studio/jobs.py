"""Work that waits, runs or has ended: a folder each, in which every fact is a file of its own.

    job.json       what is to be done; written once, by the studio
    started.json   there from the moment it begins: a job begins once
    process.json   the process that runs, for the one who wants to stop it
    lock           held as long as a process of it lives, whoever its parent is
    stop           the wish to stop it
    ended.json     how it ended; missing where its keeper was killed as well
    log.txt        what it has printed

Who asks how a job stands reads these, so that a studio that is killed and started again knows what the last one knew.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.locks import FileLock
from qwen_image_finetune.studio.shelf import Refused, Shelf

JOB, STARTED, PROCESS, ENDED, LOCK, STOP, LOG = (
    "job.json", "started.json", "process.json", "ended.json", "lock", "stop", "log.txt",
)  # fmt: skip
CONFIGURATION = "config.yaml"  # of a job that trains
VERBS = ("train", "evaluate", "predict", "look", "caption", "push", "grid")  # that a job may consist of
Kind = Literal["train", "evaluate", "predict", "look", "caption", "push"]
State = Literal["waiting", "running", "done", "failed", "stopped", "killed"]
MOST_LOG = 60_000  # bytes of a log that are shown
PATIENCE = 20  # hundredths of a second
STOPPED = (130, 143, -signal.SIGTERM, -signal.SIGINT)  # exit codes


@dataclass(frozen=True)
class Step:
    """One verb with its arguments."""

    verb: str
    arguments: list[str]


@dataclass(frozen=True)
class Job:
    """What is to be done, and where it stands."""

    folder: Path
    kind: Kind
    title: str
    steps: list[Step]
    created: float  # seconds since 1970
    card: bool  # needs the card, and waits until it is free
    about: dict[str, str] = field(default_factory=dict)  # what the pages want to know

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def state(self) -> State:
        ended = read(self.folder / ENDED)
        if ended is not None:
            return "done" if ended["code"] == 0 else "stopped" if ended["code"] in STOPPED else "failed"
        if is_held(self.folder / LOCK):
            return "running"
        return "killed" if (self.folder / STARTED).exists() and read(self.folder / ENDED) is None else "waiting"

    @property
    def started(self) -> float | None:
        """When it began, in seconds since 1970."""
        found = read(self.folder / STARTED)
        return None if found is None else float(found["at"])

    @property
    def ended(self) -> float | None:
        found = read(self.folder / ENDED)
        return None if found is None else float(found["at"])

    @property
    def process(self) -> int | None:
        """The process that runs now, if it is the one that was started."""
        found = read(self.folder / PROCESS)
        if found is None:
            return None
        with suppress(psutil.NoSuchProcess):
            if abs(psutil.Process(found["pid"]).create_time() - found["born"]) < 1:
                return int(found["pid"])
        return None

    def log(self, most: int = MOST_LOG) -> str:
        """The end of what it has printed."""
        path = self.folder / LOG
        return end_of(path, most) if path.is_file() else ""

    def stop(self) -> None:
        """Ask it to end: a run saves first."""
        (self.folder / STOP).touch()
        process = self.process
        if process is not None:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)


class Jobs:
    """All jobs of a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.folder = shelf.own / "jobs"

    def add(
        self,
        kind: Kind,
        title: str,
        steps: Sequence[Step],
        card: bool = False,
        configuration: str | None = None,
        about: dict[str, str] | None = None,
    ) -> Job:
        """Write a job down; it waits until the queue starts it. `{job}` before a path stands for its folder."""
        identity = f"{time.time_ns() // 1_000_000:013d}-{secrets.token_hex(3)}"  # sorts by time
        folder, partial = self.folder / identity, self.folder / f".{identity}"
        partial.mkdir(parents=True)
        if configuration is not None:
            write_atomic(partial / CONFIGURATION, configuration)
        placed = [Step(each.verb, [_placed(word, folder) for word in each.arguments]) for each in steps]
        job = Job(folder, kind, title, placed, time.time(), card, about or {})
        told = {name: value for name, value in asdict(job).items() if name != "folder"}
        write_atomic(partial / JOB, json.dumps(told, ensure_ascii=False))
        partial.rename(folder)  # whole, or not there
        return job

    def all(self) -> list[Job]:
        """The oldest first."""
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        return [job for name in names if not name.startswith(".") and (job := self._read(name)) is not None]

    def of(self, identity: str) -> Job:
        """Raises Refused where there is none of that name."""
        known = self.folder.is_dir() and identity in os.listdir(self.folder) and not identity.startswith(".")
        job = self._read(identity) if known else None
        if job is None:
            raise Refused("there is no such job (any more)", 404)
        return job

    def _read(self, identity: str) -> Job | None:
        told = read(self.folder / identity / JOB)
        if told is None:
            return None
        steps = [Step(**step) for step in told.pop("steps")]
        return Job(folder=self.folder / identity, steps=steps, **told)


def _placed(word: str, folder: Path) -> str:
    return f"{folder}{word.removeprefix('{job}')}" if word.startswith("{job}") else word


def read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or a torn one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def end_of(path: Path, most: int = MOST_LOG) -> str:
    """The last bytes of a log, secrets made unreadable."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return without_secrets(file.read().decode("utf-8", "replace"))


def is_held(path: Path) -> bool:
    """Whether a living process holds a lock file."""
    if not path.exists():
        return False
    try:
        FileLock(path, wait=False, shared=True).release()
    except BlockingIOError:
        return True
    return False


def take(path: Path) -> FileLock | None:
    """Hold a lock file; None where a process does. One that only looks (`is_held`) lets go within a moment."""
    for _ in range(PATIENCE):
        try:
            return FileLock(path, wait=False)
        except BlockingIOError:
            time.sleep(0.01)
    return None


def secrets_here() -> Iterator[str]:
    """Values of the environment that nobody should see."""
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in ("TOKEN", "KEY", "SECRET", "PASSWORD")):
            yield value


def without_secrets(text: str) -> str:
    """What a process printed, with tokens and passwords made unreadable."""
    for secret in secrets_here():
        text = text.replace(secret, "***")
    return text
