"""Which files a data set has: the row of one sample, and a folder that is listed but never left."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen_image_finetune.records import Extent

NOT_UTF8 = "its name is not UTF-8, and names go into hashes and files; rename it"
LONGEST_CAPTION = 1_000_000  # bytes, or characters in a table; models read a few hundred words
PICTURES = (".jpg", ".jpeg", ".png", ".webp")  # endings of picture files, in any case


@dataclass(frozen=True, slots=True)
class Shared:
    """What all rows of one data set have in common."""

    number: int = 0  # of the set among several
    name: str = ""
    weight: float | None = None  # share of the visits, beside those of the other sets
    repeats: int = 1  # visits in an epoch
    prefix: str = ""  # stands before the prompts
    per_line: bool = False  # each line of a caption is a prompt
    identity: tuple[str, ...] = ()  # the rows want their source as it is, and ask for it so
    image_size: Extent | None = None  # of every target, as it was given
    areas: tuple[int, ...] = ()  # in pixels, that visits take turns at, the largest first; none: the model's own
    caption_dropout: float = 0.0
    reference_dropout: float = 0.0


ALONE = Shared()


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a data set: where its files are. File names are relative to the folder, which all rows share.

    Names instead of paths: a hundred thousand rows take a quarter of the memory.
    """

    key: str  # unique in the data set, the same in every run
    folder: Path
    target_name: str
    reference_names: tuple[str, ...]
    caption_name: str | None  # file of the prompt
    prompt: str | None  # or the prompt itself
    mask_name: str | None
    more_prompts: tuple[str, ...] = ()  # beside `prompt`
    shared: Shared = ALONE

    @property
    def target(self) -> Path:
        return self.folder / self.target_name

    @property
    def references(self) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in self.reference_names)

    @property
    def caption(self) -> Path | None:
        return None if self.caption_name is None else self.folder / self.caption_name

    @property
    def mask(self) -> Path | None:
        return None if self.mask_name is None else self.folder / self.mask_name


class RowFault(str):
    """What is wrong with one row, in words: the others can be trained on without it."""

    row: str  # its key, or what tells it apart where it did not become a row

    def __new__(cls, words: str, row: str = "") -> RowFault:
        fault = super().__new__(cls, words)
        fault.row = row
        return fault


class Tree:
    """A folder and what lies in it. Each directory is listed once; plain files are never looked at one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = os.path.realpath(folder)
        self._listed: dict[str, dict[str, str]] = {}

    def list(self, directory: str = "") -> dict[str, str]:
        """Name -> "file", "folder", or what is wrong with it. Hidden names (.DS_Store, ._x.jpg) are left out."""
        if directory not in self._listed:
            with os.scandir(self.folder / directory) as entries:
                self._listed[directory] = {
                    _shown(entry.name): self._kind(entry) for entry in entries if not entry.name.startswith(".")
                }
        return self._listed[directory]

    def named(self, name: str) -> str:
        """The path `name` as the disk spells it: letters with accents may be written as one character or as two."""
        done = ""
        for part in PurePosixPath(name).parts:
            spelt = part
            if self.folder_fault(done) is None if done else True:
                listed = self.list(done)
                spelt = part if part in listed else next((each for each in listed if same(each) == same(part)), part)
            done = f"{done}/{spelt}" if done else spelt
        return done

    def folder_fault(self, directory: str) -> str | None:
        """Why `directory` cannot be listed, or None. Looks at every folder above it, which may be a link as well."""
        above, _, name = directory.rpartition("/")
        fault = self.folder_fault(above) if above else None
        if fault is not None:
            return fault
        kind = self.list(above).get(name, "no such folder")
        if kind == "folder":
            return None
        return "a file, not a folder" if kind == "file" else kind

    def file_fault(self, name: str) -> str | None:
        """Why the file `name`, relative to the folder, must not or cannot be read, or None."""
        path = PurePosixPath(name)
        if _shown(name) != name:
            return NOT_UTF8
        if path.is_absolute() or ".." in path.parts:
            return "leaves the data set's folder; only relative paths inside it are read"
        above, _, last = str(path).rpartition("/")
        fault = self.folder_fault(above) if above else None
        if fault is not None:
            return f"{above} is {fault}"
        kind = self.list(above).get(last, "no such file")
        if kind == "file":
            return None
        return "a folder, not a file" if kind == "folder" else kind

    def _kind(self, entry: os.DirEntry[str]) -> str:
        if _shown(entry.name) != entry.name:
            return NOT_UTF8
        if entry.is_symlink():
            aim = os.path.realpath(entry.path)
            if not Path(aim).is_relative_to(self._root):
                return "a link that leaves the data set's folder; copy the file there"
            if not os.path.exists(aim):
                return f"a link to {aim}, which is not there"
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "neither a file nor a folder"


def unwritable(text: str) -> str | None:
    """Why a text cannot be written as UTF-8, or None: JSON and bad bytes of a command line bring half characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"has half a character ({text[error.start : error.end]!a}) at place {error.start}: no text in UTF-8"
    return None


def caption_fault(text: str) -> str | None:
    """Why the text of a table's cell cannot be a caption, or None."""
    if broken := unwritable(text):
        return broken
    too_long = f"has {len(text)} characters; a caption has at most {LONGEST_CAPTION}"
    return too_long if len(text) > LONGEST_CAPTION else None


def same(name: str) -> str:
    """Equal for names that a reader takes for equal, however their accents are composed (Unicode's NFC)."""
    return unicodedata.normalize("NFC", name)


def _shown(name: str) -> str:
    r"""A name that can be printed: bytes that are not UTF-8, which Python keeps as lone surrogates, as \udce9."""
    return name.encode("utf-8", "backslashreplace").decode()
