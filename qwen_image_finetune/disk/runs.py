"""The version folders of a project: OUTPUT_DIR/PROJECT/v0, v1, ...; who owns them, what is in them, what may go.

A running process holds a lock on its version (`run.lock`); the kernel drops it when the process ends, however it ends.
Who makes, reopens or removes versions holds the lock of the project (`.lock`). Order always comes from the numbers in
names, never from the clock.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from qwen_image_finetune.disk import history
from qwen_image_finetune.disk.events import event_steps
from qwen_image_finetune.disk.files import (
    DiskFull,
    append_line,
    clean_leftovers,
    flush_file,
    remove_folder,
    sync_folder,
    write_atomic,
)
from qwen_image_finetune.disk.history import BEST, LOG, METRICS, STATE
from qwen_image_finetune.disk.locks import FileLock
from qwen_image_finetune.disk.manifest import verify_folder
from qwen_image_finetune.disk.reading import read_regular
from qwen_image_finetune.disk.versions import (
    SUPERSEDED,
    VERSION,
    RunError,
    checkpoint_folders,
    linked,
    links_around,
    step_of,
    verify_checkpoint,
    version_folders,
)

DRAWN = re.compile(r"^step-(\d+)$")  # folders in `samples`
MIN_STEPS = 5  # ended versions with fewer optimizer steps are removed when a new run starts
LOCK = "run.lock"
State = Literal["running", "finished", "failed", "interrupted"]


class Run:
    """One version folder, owned by this process until `close` or its end."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path, self.name = path, path.name
        self._lock = lock
        self._sound: dict[Path, list[tuple[str, int, int, int]]] = {}  # checkpoints verified, and their files then
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            DiskFull: no space is left; no part of the line stays.
        """
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        append_line(self.path / METRICS, json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")

    def log(self, line: str) -> None:
        """Append what was said to log.txt. Saying it must not end the run: what does not fit on the disk is dropped."""
        with suppress(OSError):
            append_line(self.path / LOG, line)

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`, and any torn one, so that a resumed run logs every step once."""
        path = self.path / METRICS
        kept = "".join(json.dumps(line) + "\n" for line in history.lines(path) if line["step"] <= step)
        if path.exists() and read_regular(path, history.LONGEST) != kept.encode():
            write_atomic(path, kept)

    def rewind(self, step: int) -> None:
        """Make `step` the end of this version, for a resume from there.

        Metrics after it are dropped. Checkpoints after it, damaged ones or those of a branch the user left by naming
        an older checkpoint, move to the folder `superseded`: `latest` and the limit on checkpoints must not take
        them for the newest of the run that now continues. So do samples after it: its report must not show them.
        """
        self.truncate_metrics(step)
        best = history.read_best(self.path)
        if best is not None and best["step"] > step:
            (self.path / BEST).unlink()
        drawn = [
            path for path in self.path.glob("samples/*") if (found := DRAWN.match(path.name)) and int(found[1]) > step
        ]
        for folder in [*(path for path in checkpoint_folders(self.path) if step_of(path) > step), *drawn]:
            aside = self.path / SUPERSEDED
            aside.mkdir(exist_ok=True)
            count = sum(1 for other in aside.iterdir() if other.name.startswith(f"{folder.name}.")) + 1
            _move(folder, aside / f"{folder.name}.{count}")
            sync_folder(folder.parent)

    def finish(self, state: State, step: int) -> None:
        """Write how the run stands after `step` to run.json; metrics are flushed to the disk first."""
        if (self.path / METRICS).exists():
            flush_file(self.path / METRICS)
        write_atomic(self.path / STATE, json.dumps({"state": state, "step": step}) + "\n")

    def checkpoint_path(self, epoch: int, step: int) -> Path:
        """Where a checkpoint is kept: `step` optimizer steps are done, the last of them in `epoch` (0-based)."""
        return self.path / f"checkpoint-{epoch}-{step}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint folders, ordered by step. Their checksums are verified by whoever loads one."""
        return [folder for folder in checkpoint_folders(self.path) if verify_checkpoint(folder, False) is None]

    def is_sound(self, checkpoint: Path) -> bool:
        """Whether its checksums hold. Files that did not change since they were last verified are not read again."""
        stats = [(str(path), path.stat()) for path in sorted(checkpoint.rglob("*"))]
        files = [(name, stat.st_ino, stat.st_size, stat.st_ctime_ns) for name, stat in stats]
        if self._sound.get(checkpoint) != files:
            if verify_checkpoint(checkpoint) is not None:
                return False
            self._sound[checkpoint] = files
        return True

    def close(self) -> None:
        """Let go of the version. The end of the process does the same."""
        self._lock.release()


def claim_version(project_dir: Path, needed: Sequence[Path] = ()) -> Run:
    """Make the next version of a project and own it; versions that ended before step 5 go first.

    Kept, whatever their steps: versions of living processes, versions with a checkpoint of 5 or more steps, unfinished
    ones with a complete checkpoint to resume from, links, and whatever a link leads to or from.

    Args:
        needed: files or folders that the new run is about to read; the versions that they lie in are kept as well.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        project_dir.mkdir(parents=True, exist_ok=True)
        with _project_lock(project_dir):
            clean_leftovers(project_dir)
            links = [*links_around(project_dir), *((project_dir, path.resolve()) for path in needed)]
            for version in version_folders(project_dir):
                _tidy(version, links)
            path = next_version(project_dir)
            path.mkdir()
            run = _begin(Run(path, FileLock(path / LOCK, wait=False)), 0)
            sync_folder(project_dir)
            return run
    except DiskFull:
        raise
    except OSError as error:
        raise RunError(
            f"cannot make a version folder in {project_dir}: {error.strerror or error}; logging.output_dir must name "
            "a folder that can be written, on a file system with locks"
        ) from error


def next_version(project_dir: Path) -> Path:
    """The folder that the next new version of a project gets; there may be no project yet."""
    names = os.listdir(project_dir) if project_dir.is_dir() else []
    return project_dir / f"v{max((int(name[1:]) for name in names if VERSION.match(name)), default=-1) + 1}"


def reopen_version(path: Path) -> Run:
    """Own an existing version again, to resume it.

    Raises:
        RunError: it is gone, cannot be written, another living process holds it, or its best.json is damaged.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not there (any more): nothing to resume")
    history.read_best(path)
    try:
        with _project_lock(path.parent):
            try:
                lock = FileLock(path / LOCK, wait=False)
            except BlockingIOError as error:
                owner = read_regular(path / LOCK).decode(errors="replace").strip() or "another process"
                raise RunError(
                    f"{path} is in use by {owner}, which still runs: two runs must not write one version. Wait for it, "
                    "stop it, or start afresh with train.resume_from_checkpoint=null"
                ) from error
            _clean(path)
            return _begin(Run(path, lock), history.steps_of(path))
    except DiskFull:
        raise
    except OSError as error:
        raise RunError(f"cannot resume in {path}: {error.strerror or error}") from error


def retention(run: Run, limit: int | None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`; call it once the new one is complete.

    Only sound checkpoints count towards the limit: a damaged one never pushes a good one out. The best one on held-out
    pairs stays, beyond the limit if need be, and so does one that is a link, or that a link leads to.
    """
    if limit is None:
        return
    sound, best = 0, history.best_checkpoint(run.path)
    for folder in reversed(run.checkpoints()):
        if sound < limit:
            sound += run.is_sound(folder)
        elif folder != best and not linked(folder, links_around(run.path.parent)):
            remove_folder(folder)


def outcome(version: Path) -> str:
    """How a version ended, or "running"; "killed" where its process is gone and could not say so; else "unknown"."""
    state = history.state_of(version) or "unknown"
    return "killed" if state == "running" and not _is_alive(version) else state


def unfinished(project_dir: Path) -> Path | None:
    """The newest version of a project, if it ended before its end and can be resumed."""
    newest = next(reversed(version_folders(project_dir)), None)
    return None if newest is None or _is_alive(newest) or not _is_resumable(newest) else newest


def _is_alive(version: Path) -> bool:
    """Whether a process owns the version; one that cannot be looked at may be."""
    if not (version / LOCK).exists():
        return False
    try:
        FileLock(version / LOCK, wait=False, shared=True).release()
    except OSError:
        return True
    return False


def _begin(run: Run, step: int) -> Run:
    try:
        run.finish("running", step)
    except OSError:
        run.close()
        raise
    return run


def _tidy(version: Path, links: Iterable[tuple[Path, Path]]) -> None:
    """Clean an ended version, or remove it if it is a short one. The project lock is held.

    What is not as we write it, so that nobody can say what it is worth, is left alone, and so is what links hold on to.
    """
    with suppress(RunError):
        if not linked(version, links):
            _tidy_own(version)


def _tidy_own(version: Path) -> None:
    if not os.listdir(version):  # its process died between making the folder and taking the lock
        version.rmdir()
        return
    if not (version / LOCK).exists():  # not written by this program: never cleaned, and removed only if surely a run
        events = list(version.glob("events.out.tfevents.*"))
        if (events or checkpoint_folders(version)) and _is_short(version):
            remove_folder(version)
        return
    try:
        lock = FileLock(version / LOCK, wait=False)
    except BlockingIOError:
        return
    try:
        _clean(version)
        if _is_short(version) and not _is_resumable(version):
            remove_folder(version)
    finally:
        lock.release()


def _clean(version: Path) -> None:
    """Remove what a killed process left half-written, before a resume sets folders aside: its lock is held."""
    for folder in (version, version / "samples", *version.glob("samples/*/")):
        if folder.is_dir() and not folder.is_symlink():
            clean_leftovers(folder)


def _is_short(version: Path) -> bool:
    """Fewer than five steps by every record there is, the event files included."""
    if history.steps_of(version) >= MIN_STEPS:
        return False
    events = version.glob("**/events.out.tfevents.*")
    return all(step < MIN_STEPS for path in events for step in event_steps(path))


def _is_resumable(version: Path) -> bool:
    """Stopped before its end, with a complete checkpoint. A process that was killed left the state "running"."""
    complete = (verify_folder(folder, checksums=False) is None for folder in checkpoint_folders(version))
    return history.state_of(version) not in (None, "finished") and any(complete)


def _move(path: Path, to: Path) -> None:
    """Rename a folder; a link goes on leading where it led."""
    if path.is_symlink():
        to.symlink_to(path.resolve())
        path.unlink()
    else:
        os.rename(path, to)


@contextmanager
def _project_lock(project_dir: Path) -> Iterator[None]:
    lock = FileLock(project_dir / ".lock", wait=True)
    try:
        yield
    finally:
        lock.release()
