"""Where versions and checkpoints are: OUTPUT_DIR/PROJECT/vN/checkpoint-EPOCH-STEP.

Each of these may be a link to a folder that was moved away. There is one idea of where a checkpoint belongs: to the
version of the project among whose checkpoints it stands, by whatever path it was named. What a link leads to is read
and written through it; neither a link nor what one leads to is ever removed (`linked`). Knows nothing of what runs do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qwen_image_finetune.disk.manifest import MANIFEST, verify_folder, written_as

VERSION = re.compile(r"^v(0|[1-9]\d*)$")
CHECKPOINT = re.compile(r"^checkpoint-(\d+)-(\d+)$")
SUPERSEDED = "superseded"  # folder of what a resume from an older checkpoint set aside
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
HUB = "hub"  # folder, in a version, of what is sent to the hub


class RunError(ValueError):
    """A version or checkpoint that cannot be made, reopened or resumed, in words for the person who asked for it."""


def version_folders(project_dir: Path) -> list[Path]:
    """Version folders of a project by number, links among them."""
    if not project_dir.is_dir():
        return []
    found = [path for path in project_dir.iterdir() if VERSION.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[1:]))


def checkpoint_folders(version: Path) -> list[Path]:
    """Folders named like checkpoints, complete or not, ordered by step."""
    found = [path for path in version.glob("checkpoint-*-*") if CHECKPOINT.match(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def superseded_folders(version: Path) -> list[Path]:
    """Checkpoints that were set aside."""
    return [path for path in version.glob(f"{SUPERSEDED}/checkpoint-*-*") if path.is_dir()]


def step_of(checkpoint: Path) -> int:
    """Optimizer steps in the name of a checkpoint; 0 where it is none."""
    found = CHECKPOINT.match(_plain_name(checkpoint.name))
    return int(found[2]) if found else 0


def at_home(project_dir: Path, folder: Path) -> Path:
    """A checkpoint by the path that it has in the project, whatever the one it was named by; else where that leads."""
    for version in version_folders(project_dir):
        for known in (*checkpoint_folders(version), *superseded_folders(version)):
            if known.samefile(folder):
                return known
    return folder.resolve()


def version_of(project_dir: Path, checkpoint: Path) -> Path | None:
    """The version of the project that a checkpoint belongs to; None for one from elsewhere."""
    if not checkpoint.is_dir():
        return None
    parent = at_home(project_dir, checkpoint).parent
    version = parent.parent if parent.name == SUPERSEDED else parent
    return next((known for known in version_folders(project_dir) if known.samefile(version)), None)


def verify_checkpoint(folder: Path, checksums: bool = True) -> str | None:
    """`verify_folder`, and that a checkpoint of one step does not call itself that of another."""
    if (problem := verify_folder(folder, checksums)) is not None:
        return problem
    written, called = written_as(folder), _plain_name(folder.name)
    if written is not None and CHECKPOINT.match(called) and called != written:
        return f"{folder} was written as {written}: it is not the checkpoint that its name says"
    return None


def find_checkpoint(project_dir: Path, spec: str, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint that `train.resume_from_checkpoint` names, verified to the last byte, by its path in the project.

    Args:
        spec: "latest", the path of a checkpoint folder, or that of a version, whose newest checkpoint is meant.
        warn: told of every damaged checkpoint that is passed over.

    Returns:
        The folder; None where "latest" finds none in the project.

    Raises:
        RunError: the named folder is missing, damaged, or holds weights only.
    """
    if spec == "latest":
        versions = reversed(version_folders(project_dir))
        return next((found for version in versions if (found := _newest_valid(version, warn))), None)
    folder = Path(spec).expanduser()
    is_version = VERSION.match(folder.name) or VERSION.match(folder.resolve().name)
    if is_version and (newest := _newest_valid(folder, warn)) is not None:
        return at_home(project_dir, newest)
    problem = verify_checkpoint(folder)
    if problem is None:
        return at_home(project_dir, folder)
    if (folder / LORA_WEIGHTS).is_file() and not (folder / MANIFEST).exists():
        raise RunError(
            f"train.resume_from_checkpoint={spec}: {folder} holds {LORA_WEIGHTS} but no state to resume from (it has "
            f"no {MANIFEST}); to start a new run from these weights set model.lora.pretrained_weight to it instead"
        )
    beside = folder if is_version else folder.parent
    newest = _newest_valid(beside, lambda _: None)
    hint = f"the newest valid checkpoint there is {newest}" if newest else f"{beside} has no valid checkpoint"
    raise RunError(f"train.resume_from_checkpoint={spec}: {problem}; {hint}")


def linked(folder: Path, links: Iterable[tuple[Path, Path]]) -> bool:
    """Whether a folder is a link, holds one that leads out of it, or is where one leads from outside, or contains that.

    Args:
        links: as `links_around` finds them.
    """
    if folder.is_symlink():
        return True
    here = folder.resolve()
    inside = (Path(place) / name for place, folders, names in os.walk(here) for name in (*folders, *names))
    return any(not path.resolve().is_relative_to(here) for path in inside if path.is_symlink()) or any(
        target.is_relative_to(here) and not link.is_relative_to(here) for link, target in links
    )


def links_around(project_dir: Path) -> Iterator[tuple[Path, Path]]:
    """(link, where it leads) for every link in the folders of output, project and versions."""
    here = project_dir.resolve()
    versions = version_folders(here)
    for folder in (here.parent, here, *versions, *(version / SUPERSEDED for version in versions)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_symlink():
                yield path, path.resolve()


def _newest_valid(version: Path, warn: Callable[[str], None]) -> Path | None:
    for folder in reversed(checkpoint_folders(version)):
        problem = verify_checkpoint(folder)
        if problem is None:
            return folder
        warn(f"{problem}: passed over, looking for the next older checkpoint")
    return None


def _plain_name(name: str) -> str:
    """Without the number that a superseded checkpoint is given."""
    return name.partition(".")[0]
