"""Files that come in: where each belongs by its name, how much is taken, and what is refused."""

from __future__ import annotations

import re
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from PIL import Image

from qwen_image_finetune.data.images import DataError, open_upright
from qwen_image_finetune.data.listing import PICTURES
from qwen_image_finetune.studio.shelf import Refused

Side = Literal["before", "after"]

LARGEST_PICTURE = 100 * 2**20  # bytes of one file
LARGEST_CAPTION = 100_000
LARGEST_ZIP = 8 * 2**30
MOST_ENTRIES = 50_000  # of a zip
LARGEST_CONTENT = 16 * 2**30  # bytes of a zip, unpacked
LONGEST_STEM = 100  # characters
CHUNK = 2**20

_BEFORE = re.compile(r"control(_images)?(_\d+)?|conditioning.*|before|source(s|_images)?|inputs?|reference(s|_images)?")
_AFTER = re.compile(r"main|training(_images)?|after|targets?(_images)?|outputs?|edited(_images)?|images?")
# ROOT_start and ROOT_end are fal's; the others are what people write.
_BEFORE_ENDING = re.compile(r"(.+?)[_-](start|source|before|input|orig|original)(\d*)", re.IGNORECASE | re.DOTALL)
_AFTER_ENDING = re.compile(r"(.+?)[_-](end|target|after|output|edited|result)", re.IGNORECASE | re.DOTALL)
_FOLDER_NUMBER = re.compile(r".*_([1-9]\d*)")


@dataclass(frozen=True)
class Place:
    """Where a file belongs."""

    side: Side | None  # None: its name does not say
    stem: str
    ending: str  # with its dot, in small letters
    number: int = 0  # of a reference; 0 is the first

    @property
    def is_caption(self) -> bool:
        return self.ending == ".txt"

    @property
    def name(self) -> str:
        """What the file is called in its folder."""
        further = f"_control_{self.number}" if self.side == "before" and self.number else ""
        return f"{self.stem}{further}{self.ending}"


def place_of(name: str, side: Side | None = None) -> Place:
    """Where the file `name` belongs; folders in the name count, nothing of them is kept.

    Args:
        side: where the person has put it, for a name that does not say.

    Raises:
        Refused: it is neither a picture nor a caption.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    ending = path.suffix.lower()
    if ending not in (*PICTURES, ".txt"):
        raise Refused(f"not a picture ({', '.join(PICTURES)}), a caption (.txt) or a zip")
    if path.name.startswith(".") or "__MACOSX" in path.parts:
        raise Refused("a hidden file")
    stem, number = path.stem, 0
    for folder in (part.lower() for part in reversed(path.parts[:-1])):
        if _BEFORE.fullmatch(folder):
            found = _FOLDER_NUMBER.fullmatch(folder)
            side, number = "before", int(found[1]) if found else 0
            number -= number > 0 and folder == f"control_{number}"  # Civitai counts them from 1
            break
        if _AFTER.fullmatch(folder):
            side = "after"
            break
    else:
        if match := _BEFORE_ENDING.fullmatch(stem):
            side, stem, number = "before", match[1], max(int(match[3] or 1) - 1, 0)
        elif match := _AFTER_ENDING.fullmatch(stem):
            side, stem = "after", match[1]
    return Place("after" if ending == ".txt" else side, clean_stem(stem), ending, number)


def clean_stem(stem: str) -> str:
    """A name for a file that no file system and no shell stumbles over.

    Raises:
        Refused: nothing is left of it.
    """
    text = unicodedata.normalize("NFC", stem)
    text = "".join(letter if letter.isalnum() or letter in " ._-()+,'" else "_" for letter in text)
    text = text.strip(" .")[:LONGEST_STEM].rstrip(" .")
    if not text:
        raise Refused("a name without a letter")
    return text


def check_picture(path: Path) -> None:
    """Refuse what is no picture, or too many pixels of one, before anything else looks at it.

    Raises:
        Refused: in words.
    """
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None, "Pillow's guard against decompression bombs is off"
    try:
        open_upright(path)
    except DataError as error:
        raise Refused(str(error).replace(f"{path}: ", "")) from error


def unpack(path: Path, take: Callable[[str, IO[bytes]], None]) -> Iterator[tuple[str, str]]:
    """Hand every file of a zip to `take`, by its name in there; yields (name, why) for those that are refused.

    Sizes are counted while unpacking: what a zip says of itself is not believed.

    Raises:
        Refused: it is no zip, or holds more than is taken.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError) as error:
        raise Refused("not a zip file, or a damaged one") from error
    with archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(entries) > MOST_ENTRIES:
            raise Refused(f"{len(entries):,} files in one zip; at most {MOST_ENTRIES:,} are taken")
        if sum(entry.file_size for entry in entries) > LARGEST_CONTENT:
            raise Refused(f"more than {LARGEST_CONTENT / 2**30:.0f} GiB when unpacked")
        for entry in entries:
            if stat.S_ISLNK(entry.external_attr >> 16):
                yield entry.filename, "a link"
                continue
            try:
                with archive.open(entry) as content:
                    take(entry.filename, content)
            except Refused as error:
                yield entry.filename, str(error)
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError) as error:
                yield entry.filename, f"cannot be unpacked ({error})"


def copy_bounded(source: IO[bytes], final: Path, limit: int) -> None:
    """Write what `source` gives to a file, up to `limit` bytes.

    Raises:
        Refused: it gives more.
    """
    size = 0
    with open(final, "xb") as file:
        while chunk := source.read(CHUNK):
            size += len(chunk)
            if size > limit:
                raise Refused(f"larger than {limit / 2**20:.0f} MiB")
            file.write(chunk)
