"""Where a verb may write what it was asked for: never over a part of a run, and over anything else only if told to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from qwen_image_finetune.disk import history, manifest, runs
from qwen_image_finetune.disk.reading import Unreadable
from qwen_image_finetune.disk.versions import CHECKPOINT, SUPERSEDED, VERSION

RUN = (history.STATE, runs.LOCK, "config.yaml")  # any of them makes a folder called vN a version
PARTS = {
    *RUN, history.METRICS, history.LOG, history.BEST, history.ENVIRONMENT, history.DATA, manifest.MANIFEST,
    "samples", SUPERSEDED,
}  # fmt: skip


class OutputError(ValueError):
    """A place that a verb must not write to."""


def check_output(
    path: Path, overwrite: bool, ours: Callable[[Path], bool] = lambda path: False, folder: bool = False
) -> None:
    """Refuse to write a file that somebody else needs, or where none can be; before anything is computed.

    The folder that it will be in is made.

    Args:
        overwrite: the person said so. What belongs to a run is refused all the same.
        ours: whether something that is there is what the verb itself wrote before, and may write again.
        folder: a folder is written, not a file.

    Raises:
        OutputError: names the path and the way out.
    """
    if path.exists() and path.is_dir() != folder:
        wanted, found = ("folder", "file") if folder else ("file", "folder")
        raise OutputError(f"{path} is a {found}, and a {wanted} is to be written: choose another output")
    _check_writable(path.parent)
    if (owner := _owner(path.resolve())) is not None:
        raise OutputError(f"{path} belongs to the run {owner}, which would be damaged: choose another output")
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())) or ours(path):
        return
    raise OutputError(f"{path} is there already: choose another output, or replace it with --overwrite")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror}): choose another output") from error


def _owner(path: Path) -> Path | None:
    """The version or the checkpoint that a path is a part of, or will be."""
    for folder in path.parents:
        first = path.relative_to(folder).parts[0]
        if VERSION.match(folder.name) and any((folder / name).exists() for name in RUN) and _is_part(first):
            return folder
        try:
            if manifest.holds(folder, path):
                return folder
        except (OSError, Unreadable):
            continue
    return None


def _is_part(name: str) -> bool:
    return name in PARTS or CHECKPOINT.match(name) is not None or name.startswith("events.out.tfevents.")
