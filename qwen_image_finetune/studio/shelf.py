"""The folder that is shown: what lies in it, and that nothing outside it is read or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from qwen_image_finetune.config.registry import INDEX_FILES
from qwen_image_finetune.data.listing import PICTURES
from qwen_image_finetune.data.metadata import METADATA
from qwen_image_finetune.data.sources import TARGETS
from qwen_image_finetune.disk.history import STATE
from qwen_image_finetune.disk.runs import LOCK
from qwen_image_finetune.disk.versions import VERSION

OWN = ".studio"  # folder of the studio's own files: thumbnails, the queue, the bin
DEEPEST = 8  # folders below one another that are looked into
MOST_FOLDERS = 20_000  # looked into
LARGEST_CONFIGURATION = 100_000  # bytes of a YAML file that may be one


class Refused(ValueError):
    """Something that the studio does not do, in words for the person who asked for it."""

    def __init__(self, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True)
class Found:
    """What lies on the shelf; names of folders and files, relative to it, sorted."""

    data_sets: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)  # checkpoints in diffusers layout
    configurations: list[str] = field(default_factory=list)


class Shelf:
    """A folder that is never left.

    Names are relative to it, with slashes. Hidden names (that begin with a dot) are nobody's business: the studio's own
    files are among them.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            Refused: it is no folder.
        """
        if not folder.is_dir():
            raise Refused(f"{folder} is not a folder; give the one with your pictures and runs")
        self.root = folder.resolve()
        self.own = self.root / OWN

    def inside(self, name: str) -> Path:
        """The path of `name`, which may not exist yet. Links are followed to see where they lead.

        Raises:
            Refused: it leaves the folder, or is hidden.
        """
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in path.parts)
        if "\0" in name or "\\" in name or path.is_absolute() or hidden or not path.parts:
            raise Refused(f"{name!r} is not a place in this folder", 404)
        place = self.root / path
        parent = place.parent.resolve()
        for resolved in (parent, place.resolve()):
            if not resolved.is_relative_to(self.root) or _hidden(resolved.relative_to(self.root)):
                raise Refused(f"{name!r} leads out of this folder", 404)
        return parent / place.name

    def folder(self, name: str) -> Path:
        """The same for a folder that is there; "" is the shelf itself."""
        path = self.inside(name) if name else self.root
        if not path.is_dir():
            raise Refused(f"there is no folder {name!r}", 404)
        return path

    def picture(self, name: str) -> Path:
        """The same for a picture file that is there."""
        path = self.inside(name)
        if path.suffix.lower() not in PICTURES or not path.is_file():
            raise Refused(f"there is no picture {name!r}", 404)
        return path

    def name(self, path: Path) -> str:
        """The name of a path inside; "" for the shelf itself."""
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name

    def run(self, name: str) -> Path:
        """The version folder of a run."""
        path = self.folder(name)
        if not VERSION.match(path.name):
            raise Refused(f"{name!r} is not the folder of a run", 404)
        return path

    def sealed(self, folder: Path) -> Path:
        """`folder`, once no link in it is found to lead out of the shelf: a verb is about to read it as a whole.

        Raises:
            Refused: one does.
        """
        for above, folders, files in os.walk(folder):
            for name in (*folders, *files):
                path = Path(above, name)
                if path.is_symlink() and not path.resolve().is_relative_to(self.root):
                    raise Refused(f"{self.name(path)} is a link that leads out of this folder")
        return folder

    def found(self) -> Found:
        """Everything on the shelf. Looks at names alone."""
        found = Found()
        for name, folders, files in self._walk():
            if TARGETS in folders or any(table in files for table in METADATA):
                found.data_sets.append(name)
            elif VERSION.match(name.rpartition("/")[2]) and not {LOCK, STATE, "config.yaml"}.isdisjoint(files):
                found.runs.append(name)
            elif not files.isdisjoint(INDEX_FILES):
                found.models.append(name)
            else:
                found.configurations.extend(self._configurations(name, files))
        return found

    def _walk(self) -> Iterator[tuple[str, set[str], set[str]]]:
        """(name, folders in it, files in it); never follows a link to a folder."""
        waiting, seen = [("", 0)], 0
        while waiting and seen < MOST_FOLDERS:
            name, depth = waiting.pop()
            folders, files = set[str](), set[str]()
            try:
                with os.scandir(self.root / name) as entries:
                    for entry in entries:
                        if not entry.name.startswith("."):
                            kind = folders if entry.is_dir(follow_symlinks=False) else files
                            kind.add(entry.name)
            except (PermissionError, FileNotFoundError):  # not ours to read, or gone since its name was read
                continue
            seen += 1
            yield name, folders, files
            whole = TARGETS in folders or not files.isdisjoint(INDEX_FILES) or VERSION.match(name.rpartition("/")[2])
            if depth < DEEPEST and not whole:
                inner = folders - {"node_modules", "__pycache__", "site-packages"}
                waiting += [(f"{name}/{each}" if name else each, depth + 1) for each in sorted(inner, reverse=True)]

    def _configurations(self, name: str, files: set[str]) -> Iterator[str]:
        """YAML files that read like a run."""
        for file in sorted(files):
            if file.endswith((".yaml", ".yml")):
                path = self.root / name / file
                if path.is_symlink() or path.stat().st_size > LARGEST_CONFIGURATION:
                    continue
                if "pretrained_model_name_or_path" in path.read_text(encoding="utf-8", errors="replace"):
                    yield f"{name}/{file}" if name else file


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
