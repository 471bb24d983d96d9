"""Runs one job and writes down how it ended, whatever becomes of the studio meanwhile.

`python -P -m qwen_image_finetune.studio.keeper JOB_FOLDER LANE_LOCK FOLDER`. The studio starts it and need not live on.
The locks of the job and of its lane (a card, say) are handed on to the process that works: they are held until both it
and the keeper are gone, so that nothing is started twice and no card is taken twice, whoever was killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.locks import FileLock
from qwen_image_finetune.studio.jobs import ENDED, LOCK, LOG, PROCESS, STARTED, STOP, VERBS, take

BUSY = 75  # exit code: somebody else has the lane, or the job


def cli() -> list[str]:
    """The command `qif`. -P: nothing that lies in the person's folder is imported."""
    return [sys.executable, "-P", "-m", "qwen_image_finetune.cli"]


def program(verb: str) -> list[str]:
    """The command line of a verb that a job may consist of."""
    assert verb in VERBS, verb
    ours = {"look": "looking", "caption": "captioning", "grid": "grid"}
    if verb in ours:
        return [sys.executable, "-P", "-m", f"qwen_image_finetune.studio.{ours[verb]}"]
    return [*cli(), verb]


def keep(job: Path, lane: Path, folder: Path) -> int:
    """Run the steps of a job until one fails; returns the exit code of the last."""
    try:
        locks = [lock for path in (lane, job / LOCK) if (lock := take(path)) is not None]
    except FileNotFoundError:  # the job was withdrawn
        return BUSY
    if len(locks) < 2:
        return BUSY
    try:
        descriptor = os.open(job / STARTED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return BUSY
    os.write(descriptor, json.dumps({"at": time.time()}).encode())
    os.close(descriptor)
    told = json.loads((job / "job.json").read_text(encoding="utf-8"))
    code = 0
    with open(job / LOG, "ab") as log:
        for step in told["steps"]:
            code = run([*program(step["verb"]), *step["arguments"]], job, folder, locks, log.fileno())
            if code != 0:
                break
    write_atomic(job / ENDED, json.dumps({"code": code, "at": time.time()}))
    return code


def run(command: list[str], job: Path, folder: Path, locks: list[FileLock], log: int) -> int:
    """One process, until it ends; SIGTERM is passed on to it."""
    if (job / STOP).exists():
        return -signal.SIGTERM
    child = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=[lock.descriptor for lock in locks],
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
    )
    write_atomic(job / PROCESS, json.dumps({"pid": child.pid, "born": psutil.Process(child.pid).create_time()}))
    if (job / STOP).exists():  # asked for between the two lines above
        child.terminate()
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    return child.wait()


def main() -> None:
    sys.exit(keep(*map(Path, sys.argv[1:])))


if __name__ == "__main__":
    main()
