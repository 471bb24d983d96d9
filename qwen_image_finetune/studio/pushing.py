"""A run on the hub, in two steps: what would be sent is put together and shown; what was shown is sent."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image_finetune.config.family import REPOSITORY
from qwen_image_finetune.disk import versions
from qwen_image_finetune.studio import verbs
from qwen_image_finetune.studio.jobs import Job, Jobs, Step
from qwen_image_finetune.studio.shelf import Refused, Shelf

CARD = "README.md"


@dataclass(frozen=True)
class Wish:
    """Which checkpoint of a run goes where."""

    run: str
    repository: str
    step: int
    public: bool
    pictures: bool


def show(shelf: Shelf, wish: Wish) -> dict[str, Any]:
    """Put it together; returns the card, the files with their sizes in MiB, and the mark that `send` asks for.

    Raises:
        Refused: no such run or checkpoint, or no hub id.
    """
    path = shelf.sealed(shelf.run(wish.run))
    verbs.run(shelf, "push", [*_words(path, wish), "--dry-run"])
    folder = path / versions.HUB
    card = (folder / CARD).read_text(encoding="utf-8")
    files = [{"name": name, "mib": round(size / 2**20, 2)} for name, size in _files(folder)]
    return {"card": card, "files": files, "shown": _mark(folder, wish)}


def send(shelf: Shelf, jobs: Jobs, wish: Wish, shown: str) -> Job:
    """Queue the sending of what was shown, and of nothing else.

    Raises:
        Refused: it is not what lies there now.
    """
    path = shelf.sealed(shelf.run(wish.run))
    words = _words(path, wish)
    if not (path / versions.HUB / CARD).is_file() or _mark(path / versions.HUB, wish) != shown:
        raise Refused("look at what would be sent first: it is not what was shown", 409)
    title = f"Send {path.parent.name}/{path.name} to {wish.repository}"
    return jobs.add("push", title, [Step("push", [*words, "--yes"])], about={"run": wish.run})


def _words(path: Path, wish: Wish) -> list[str]:
    if not REPOSITORY.fullmatch(wish.repository):
        raise Refused(f"{wish.repository!r} is no place on the hub: it takes OWNER/NAME")
    if wish.step not in {versions.step_of(folder) for folder in versions.checkpoint_folders(path)}:
        raise Refused("there is no such checkpoint", 404)
    asked = [*(["--public"] if wish.public else []), *([] if wish.pictures else ["--no-pictures"])]
    return [str(path), wish.repository, "--checkpoint", str(wish.step), *asked]


def _files(folder: Path) -> list[tuple[str, int]]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(file.relative_to(folder).as_posix(), file.stat().st_size) for file in found]


def _mark(folder: Path, wish: Wish) -> str:
    """Changes with the wish, the card, and the names and sizes of the files."""
    parts = [wish.repository, wish.public, (folder / CARD).read_text(encoding="utf-8"), _files(folder)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
