"""Files to upright RGB pictures, and the one resize of the project. Needs Pillow and numpy, never torch."""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from qwen_image_finetune.data import png, shards
from qwen_image_finetune.data.colours import ProfileError, to_srgb
from qwen_image_finetune.data.kinds import kind_of
from qwen_image_finetune.records import Extent

# What a file may contain, whatever its name says.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

NARROW = 16  # pixels of a side up to which a reflection repeats the edge
LARGEST_FILE = 1 << 30  # bytes of a picture; as many pixels as are safe to open have less, even 16 bits deep
READING = 2  # part of what names an encoded picture: raise it when the same bytes are read as other pixels

# EXIF orientation -> what turns the stored pixels upright (TIFF 6.0, tag 274). 1 and unknown values need nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)

# What Pillow raises on damaged files; anything else is a fault of ours and should be seen as one.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class DataError(ValueError):
    """Data that cannot be trained on: every problem found, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)  # as the one argument, so that it survives the trip out of a worker process

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems in the data:\n" + "\n".join(f"  {line}" for line in self.problems)


def open_upright(path: str | Path, mask: bool = False, remarks: list[str] | None = None) -> Image.Image:
    """The picture in a file: RGB in the colours of sRGB, turned as its EXIF orientation says, transparency on white.

    Pixels decide whether a file can be read; orientation or colour profile that cannot be read are passed over.

    Args:
        mask: its values are no colours, so its profile is left alone, and transparency is laid over black.
        remarks: what was passed over is added to it, in words.

    Raises:
        DataError: missing, no plain file, empty, truncated, animated, not a picture, or more pixels than Pillow thinks
            safe.
    """
    said: list[str] = []
    with _opened(path, True, said) as image:
        turn = _TURNS.get(_orientation(image, said))
        image.load()  # here, so that a truncated file is found out inside this block
        result = _turned(to_rgb(image, mask, said), turn)
    if remarks is not None:
        remarks += said
    return result


def size_upright(path: str | Path) -> Extent:
    """(width, height) of the upright picture, from the header alone.

    Raises:
        DataError: as `open_upright`, except for damage behind the header.
    """
    if (cell := shards.known(path)) is not None:
        return cell.width, cell.height
    with _opened(path, False, []) as image:
        return _upright_size(image)


def size_of(data: bytes, name: str) -> Extent:
    """The same of a file's bytes.

    Raises:
        DataError: with `name` before what is wrong.
    """
    with _opened(name, False, [], io.BytesIO(data)) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> Extent:
    width, height = image.size
    return (height, width) if _orientation(image, []) in _SWAPS_SIDES else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """The same for a picture that is already open: sRGB, EXIF orientation applied, transparency on white."""
    turn = _TURNS.get(_orientation(image, []))
    return _turned(to_rgb(image), turn)


def resize(image: Image.Image, size: Extent, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The one antialiased resize of the project, to (width, height): that of diffusers' `VaeImageProcessor`."""
    return image.resize(size, resample=resampling)


def fitted(
    image: Image.Image,
    scaled: Extent,
    size: Extent,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """A picture resized to `scaled`; of what stands over `size` the middle is kept, what is missing is its reflection.

    Args:
        scaled, size: (width, height).
    """
    kept = middle(resize(image, scaled, resampling), size)
    return kept if kept.size == size else _reflected(kept, size)


def middle(image: Image.Image, size: Extent) -> Image.Image:
    """The middle of a picture, `size` (width, height) large, or less where the picture is smaller."""
    width, height = min(image.width, size[0]), min(image.height, size[1])
    left, upper = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, upper, left + width, upper + height))


def _reflected(image: Image.Image, size: Extent) -> Image.Image:
    """A picture in the middle of `size`, the rest filled with its reflection: diffusers' `Flux3ImageProcessor`."""
    sides = [(size[axis] - image.size[axis], (size[axis] - image.size[axis]) // 2) for axis in (1, 0)]
    padding = [(before, missing - before) for missing, before in sides]
    pixels = np.asarray(image)
    mode: Literal["reflect", "symmetric"] = "reflect" if min(image.size) > NARROW else "symmetric"
    return Image.fromarray(np.pad(pixels, [*padding, *[(0, 0)] * (pixels.ndim - 2)], mode=mode))


def to_rgb(image: Image.Image, mask: bool = False, remarks: list[str] | None = None) -> Image.Image:
    """Any mode to RGB: 16 bits are scaled to 8, floats count from 0 to 1; see `open_upright`.

    Raises:
        DataError: values outside the range of the mode, or a mode Pillow cannot turn into RGB.
    """
    colours, alpha = _colours_and_alpha(image)
    profile = None if mask else image.info.get("icc_profile")
    rgb = colours.convert("RGB")
    if profile:
        try:
            rgb, converted = to_srgb(colours, profile)
            if converted and remarks is not None:
                remarks.append("its colours are converted to sRGB from those of its colour profile")
        except ProfileError as error:
            if remarks is not None:
                remarks.append(f"its colour profile cannot be applied, so its numbers are taken as sRGB ({error})")
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "black" if mask else "white"), rgb).convert("RGB")


def _colours_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A picture as L, RGB or CMYK of 8 bits, and its opacity (L) where some of it is transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return (image if image.mode in ("L", "CMYK") else image.convert("RGB")), None


def _deep(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """One channel of more than 8 bits. Pillow's own conversion clips at 255, which turns such pictures white."""
    values = np.asarray(image)  # (H, W) uint16, int32 or float32
    top = 1.0 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # written so that NaN is refused too
        raise DataError(
            f"a picture of mode {image.mode} has values from {values.min()} to {values.max()}; 0 to {top} is read. "
            "Save it with 8 or 16 bits per channel"
        )
    grey = Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))
    transparent = image.info.get("transparency")  # a PNG may declare one grey value transparent
    if transparent is None:
        return grey, None
    return grey, Image.fromarray((values != transparent).astype(np.uint8) * np.uint8(255))


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """A picture of its own, which no longer says that it is to be turned, or of what colours its numbers are."""
    result = image.copy() if turn is None else image.transpose(turn)
    result.info = {}
    return result


@contextmanager
def _opened(path: str | Path, pixels: bool, remarks: list[str], data: BinaryIO | None = None) -> Iterator[Image.Image]:
    """The file of a picture, its header read and found to be sound. Every fault inside becomes a DataError.

    Args:
        data: its bytes, where they were read before.
    """
    try:
        if data is None and shards.member_of(path) is None:
            _check_plain(path)
        with data or shards.opened(path) as file, _parsed(file, pixels, remarks) as image:
            _check_header(image, path)
            yield image
    except DataError as error:
        raise DataError([line if str(path) in line else f"{path}: {line}" for line in error.problems]) from None
    except _UNREADABLE as error:
        raise DataError(f"{path}: {_reason(path, error, data)}") from error


def _check_plain(path: str | Path) -> None:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: {'a folder' if stat.S_ISDIR(found.st_mode) else 'no plain file'}, not a picture")
    if found.st_size > LARGEST_FILE:
        raise DataError(f"{path}: {found.st_size} bytes, more than the {LARGEST_FILE} that are read of a picture")


def _parsed(file: BinaryIO, pixels: bool, remarks: list[str]) -> Image.Image:
    """What Pillow reads of the header; of a PNG only what makes the picture is given to it."""
    if file.read(len(png.SIGNATURE)) != png.SIGNATURE:
        file.seek(0)
        return Image.open(file, formats=FORMATS)
    found = png.essence(file, pixels)
    image = Image.open(found.file, formats=("PNG",))
    image.info.update(found.info)
    remarks += found.remarks
    return image


def _check_header(image: Image.Image, path: str | Path) -> None:
    # MPO is the JPEG of many phones: its further frames are previews or depth maps. Elsewhere frames are an animation.
    if image.format not in ("JPEG", "MPO") and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{path}: an animation; save the wanted frame as a picture of its own")
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:  # Pillow only warns up to twice this
        raise DataError(f"{path}: {pixels} pixels, more than the {limit} that are safe to open; scale it down")


def _orientation(image: Image.Image, remarks: list[str]) -> int:
    """EXIF (or XMP) orientation, before the pixels are decoded; 1, which turns nothing, where it cannot be read."""
    try:
        # The base class's reading: the one of PNG decodes the whole picture when no EXIF came before the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (*_UNREADABLE, KeyError, TypeError, OverflowError):
        remarks.append("its EXIF data cannot be read, so it is taken as upright")
        return 1
    return orientation if isinstance(orientation, int) else 1


def _reason(path: str | Path, error: BaseException, data: BinaryIO | None = None) -> str:
    """Why a file cannot be read, in words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than the {Image.MAX_IMAGE_PIXELS} pixels that are safe to open; scale it down"
    if isinstance(error, UnidentifiedImageError):
        if data is None:
            with shards.opened(path) as file:
                beginning = file.read(64)
        else:
            assert isinstance(data, io.BytesIO)
            beginning = data.getvalue()[:64] if not data.closed else b""
        if not beginning:
            return "an empty file"
        if kind := kind_of(beginning):
            return f"{kind}, whatever its name says; JPEG, PNG and WEBP are read: save it as one of them"
        return "not a picture, or damaged at its beginning; JPEG, PNG and WEBP are read"
    return f"cannot be read as a picture ({error})"
