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
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from qwen_image_finetune.disk.files import (
    MANIFEST,
    DiskFull,
    append_line,
    clean_leftovers,
    flush_file,
    remove_folder,
    sync_folder,
    verify_folder,
    write_atomic,
)
from qwen_image_finetune.disk.locks import FileLock

VERSION = re.compile(r"^v(0|[1-9]\d*)$")
CHECKPOINT = re.compile(r"^checkpoint-(\d+)-(\d+)$")
DRAWN = re.compile(r"^step-(\d+)$")  # folders in `samples`
MIN_STEPS = 5  # ended versions with fewer optimizer steps are removed when a new run starts
LOCK, STATE, METRICS, SUPERSEDED = "run.lock", "run.json", "metrics.jsonl", "superseded"
LOG = "log.txt"  # every line that was said while the version was written
ENVIRONMENT = "environment.json"  # versions and device
BEST = "best.json"  # which checkpoint is best on held-out pairs
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
State = Literal["running", "finished", "failed", "interrupted"]


class RunError(ValueError):
    """A version or checkpoint that cannot be made, reopened or resumed, in words for the person who asked for it."""


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
        kept = "".join(json.dumps(line) + "\n" for line in _lines(path) if line["step"] <= step)
        if path.exists() and path.read_text(errors="replace") != kept:
            write_atomic(path, kept)

    def rewind(self, step: int) -> None:
        """Make `step` the end of this version, for a resume from there.

        Metrics after it are dropped. Checkpoints after it, damaged ones or those of a branch the user left by naming
        an older checkpoint, move to the folder `superseded`: `latest` and the limit on checkpoints must not take
        them for the newest of the run that now continues. So do samples after it: its report must not show them.
        """
        self.truncate_metrics(step)
        if any(line["step"] > step for line in _lines(self.path / BEST)):
            (self.path / BEST).unlink()
        drawn = [
            path for path in self.path.glob("samples/*") if (found := DRAWN.match(path.name)) and int(found[1]) > step
        ]
        for folder in [*(path for path in checkpoint_folders(self.path) if step_of(path) > step), *drawn]:
            aside = self.path / SUPERSEDED
            aside.mkdir(exist_ok=True)
            count = sum(1 for other in aside.iterdir() if other.name.startswith(f"{folder.name}.")) + 1
            os.rename(folder, aside / f"{folder.name}.{count}")
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
        return [folder for folder in checkpoint_folders(self.path) if verify_folder(folder, checksums=False) is None]

    def is_sound(self, checkpoint: Path) -> bool:
        """Whether its checksums hold. Files that did not change since they were last verified are not read again."""
        stats = [(str(path), path.stat()) for path in sorted(checkpoint.rglob("*"))]
        files = [(name, stat.st_ino, stat.st_size, stat.st_ctime_ns) for name, stat in stats]
        if self._sound.get(checkpoint) != files:
            if verify_folder(checkpoint) is not None:
                return False
            self._sound[checkpoint] = files
        return True

    def close(self) -> None:
        """Let go of the version. The end of the process does the same."""
        self._lock.release()


def claim_version(project_dir: Path, needed: Path | None = None) -> Run:
    """Make the next version of a project and own it; versions that ended before step 5 go first.

    Kept, whatever their steps: versions of living processes, versions with a checkpoint of 5 or more steps, and
    unfinished ones with a complete checkpoint to resume from.

    Args:
        needed: a file or folder that the new run is about to read; the version that it lies in is kept as well.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        project_dir.mkdir(parents=True, exist_ok=True)
        with _project_lock(project_dir):
            clean_leftovers(project_dir)
            for version in _versions(project_dir):
                if needed is None or not needed.resolve().is_relative_to(version.resolve()):
                    _tidy(version)
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
        RunError: it is gone, cannot be written, or another living process holds it.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not there (any more): nothing to resume")
    try:
        with _project_lock(path.parent):
            try:
                lock = FileLock(path / LOCK, wait=False)
            except BlockingIOError as error:
                owner = (path / LOCK).read_text().strip() or "another process"
                raise RunError(
                    f"{path} is in use by {owner}, which still runs: two runs must not write one version. Wait for it, "
                    "stop it, or start afresh with train.resume_from_checkpoint=null"
                ) from error
            clean_leftovers(path)
            return _begin(Run(path, lock), steps_of(path))
    except DiskFull:
        raise
    except OSError as error:
        raise RunError(f"cannot resume in {path}: {error.strerror or error}") from error


def version_of(checkpoint: Path) -> Path | None:
    """The version that a checkpoint belongs to; None for one that was copied out of its version."""
    parent = checkpoint.resolve().parent
    version = parent.parent if parent.name == SUPERSEDED else parent
    return version if VERSION.match(version.name) else None


def find_checkpoint(project_dir: Path, spec: str, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint that `train.resume_from_checkpoint` names, verified to the last byte.

    Args:
        spec: "latest", the path of a checkpoint folder, or that of a version, whose newest checkpoint is meant.
        warn: told of every damaged checkpoint that is passed over.

    Returns:
        The folder; None where "latest" finds none in the project.

    Raises:
        RunError: the named folder is missing, damaged, or holds weights only.
    """
    if spec == "latest":
        versions = sorted(_versions(project_dir), key=_number, reverse=True)
        return next((found for version in versions if (found := _newest_valid(version, warn))), None)
    folder = Path(spec).expanduser()
    if VERSION.match(folder.name) and (newest := _newest_valid(folder, warn)) is not None:
        return newest
    problem = verify_folder(folder)
    if problem is None:
        return folder
    if (folder / LORA_WEIGHTS).is_file() and not (folder / MANIFEST).exists():
        raise RunError(
            f"train.resume_from_checkpoint={spec}: {folder} holds {LORA_WEIGHTS} but no state to resume from (it has "
            f"no {MANIFEST}); to start a new run from these weights set model.lora.pretrained_weight to it instead"
        )
    beside = folder if VERSION.match(folder.name) else folder.parent
    newest = _newest_valid(beside, lambda _: None)
    hint = f"the newest valid checkpoint there is {newest}" if newest else f"{beside} has no valid checkpoint"
    raise RunError(f"train.resume_from_checkpoint={spec}: {problem}; {hint}")


def read_metrics(version: Path) -> list[dict[str, float]]:
    """Every whole line of a version's metrics.jsonl, whether or not its process still writes it.

    `step`, then the values; non-finite ones are floats again.
    """
    return [{name: float(value) for name, value in line.items()} for line in _lines(version / METRICS)]


def retention(run: Run, limit: int | None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`; call it once the new one is complete.

    Only sound checkpoints count towards the limit: a damaged one never pushes a good one out. The best one on held-out
    pairs stays, beyond the limit if need be.
    """
    if limit is None:
        return
    sound, best = 0, best_checkpoint(run.path)
    for folder in reversed(run.checkpoints()):
        if sound < limit:
            sound += run.is_sound(folder)
        elif folder != best:
            remove_folder(folder)


def best_checkpoint(version: Path) -> Path | None:
    """The checkpoint that best.json points to; None where no held-out pairs were measured."""
    lines = _lines(version / BEST)
    return version / str(lines[0]["checkpoint"]) if lines else None


def steps_of(version: Path) -> int:
    """Optimizer steps a version reached, by the largest of its records: state, metrics, names of checkpoints."""
    checkpoints = [*checkpoint_folders(version), *version.glob(f"{SUPERSEDED}/checkpoint-*-*")]
    return max(
        *(int(line["step"]) for line in (*_lines(version / STATE), *_lines(version / METRICS), {"step": 0})),
        *(step_of(folder) for folder in checkpoints),
        0,
    )


def outcome(version: Path) -> str:
    """How a version ended, or "running"; "killed" where its process is gone and could not say so; else "unknown"."""
    state = str(_state(version).get("state", "unknown"))
    return "killed" if state == "running" and not _is_alive(version) else state


def unfinished(project_dir: Path) -> Path | None:
    """The newest version of a project, if it ended before its end and can be resumed."""
    newest = max(_versions(project_dir), key=_number, default=None)
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


def _tidy(version: Path) -> None:
    """Clean an ended version, or remove it if it is a short one. The project lock is held."""
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
        clean_leftovers(version)
        if _is_short(version) and not _is_resumable(version):
            remove_folder(version)
    finally:
        lock.release()


def _is_short(version: Path) -> bool:
    """Fewer than five steps by every record there is, the event files included."""
    if steps_of(version) >= MIN_STEPS:
        return False
    events = version.glob("**/events.out.tfevents.*")
    return all(step < MIN_STEPS for path in events for step in _event_steps(path))


def _is_resumable(version: Path) -> bool:
    """Stopped before its end, with a complete checkpoint. A process that was killed left the state "running"."""
    complete = (verify_folder(folder, checksums=False) is None for folder in checkpoint_folders(version))
    return _state(version).get("state") not in (None, "finished") and any(complete)


@contextmanager
def _project_lock(project_dir: Path) -> Iterator[None]:
    lock = FileLock(project_dir / ".lock", wait=True)
    try:
        yield
    finally:
        lock.release()


def _versions(project_dir: Path) -> list[Path]:
    """Version folders; links are left alone, as what they point to is elsewhere."""
    if not project_dir.is_dir():
        return []
    return [
        path for path in project_dir.iterdir() if VERSION.match(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _number(version: Path) -> int:
    return int(version.name[1:])


def checkpoint_folders(version: Path) -> list[Path]:
    """Folders named like checkpoints, complete or not, ordered by step."""
    found = [path for path in version.glob("checkpoint-*-*") if CHECKPOINT.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def step_of(checkpoint: Path) -> int:
    """Optimizer steps in the name of a checkpoint; 0 where it is none."""
    found = CHECKPOINT.match(checkpoint.name.partition(".")[0])
    return int(found[2]) if found else 0


def _newest_valid(version: Path, warn: Callable[[str], None]) -> Path | None:
    for folder in reversed(checkpoint_folders(version)):
        problem = verify_folder(folder)
        if problem is None:
            return folder
        warn(f"{problem}: passed over, looking for the next older checkpoint")
    return None


def _state(version: Path) -> dict[str, Any]:
    lines = _lines(version / STATE)
    return lines[0] if lines else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file that have a step; a line torn by a power failure is passed over."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                found.append(line)
    return found


def _event_steps(path: Path) -> Iterator[int]:
    """The steps in a TensorBoard event file, read without TensorBoard.

    A file is a row of records: length (8 bytes), its checksum (4), an Event message, its checksum (4). An Event
    begins with the wall time (tag 0x09, 8 bytes) and, unless it is 0, the step (tag 0x10, varint).
    """
    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12:
            start = file.read(20)
            if start[:1] == b"\x09" and start[9:10] == b"\x10":
                yield _varint(start[10:])
            file.seek(struct.unpack("<Q", head[:8])[0] + 4 - len(start), os.SEEK_CUR)


def _varint(data: bytes) -> int:
    """The number that `data` begins with, seven bits a byte, lowest first; the top bit says that more follow."""
    value = 0
    for index, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            break
    return value
