"""Files to upright RGB pictures, and the one resize of the project. Needs Pillow and numpy, never torch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# What a file may contain, whatever its name says.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

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


def open_upright(path: str | Path, background: str = "white") -> Image.Image:
    """The picture in a file: RGB, turned as its EXIF orientation says, transparency laid over `background`.

    Raises:
        DataError: missing, empty, truncated, animated, not a picture, or more pixels than Pillow thinks safe.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_header(image, path)
            turn = _TURNS.get(_orientation(image, path))
            image.load()  # here, so that a truncated file is found out inside this block
            rgb = to_rgb(image, background)
            return rgb if turn is None else rgb.transpose(turn)
    except DataError as error:
        raise DataError([line if str(path) in line else f"{path}: {line}" for line in error.problems]) from None
    except _UNREADABLE as error:
        raise DataError(f"{path}: {_reason(path, error)}") from error


def size_upright(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright picture, from the header alone.

    Raises:
        DataError: as `open_upright`, except for damage behind the header.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_header(image, path)
            width, height = image.size
            return (height, width) if _orientation(image, path) in _SWAPS_SIDES else (width, height)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(f"{path}: {_reason(path, error)}") from error


def upright(image: Image.Image) -> Image.Image:
    """The same for a picture that is already open: RGB, EXIF orientation applied, transparency on white."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The one antialiased resize of the project, to (width, height): that of diffusers' `VaeImageProcessor`."""
    return image.resize(size, resample=Image.Resampling.LANCZOS)


def fitted(image: Image.Image, scaled: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """A picture resized to `scaled`, of which the middle, `size` large, is cut out; both are (width, height)."""
    (width, height), (scaled_width, scaled_height) = size, scaled
    left, upper = (scaled_width - width) // 2, (scaled_height - height) // 2
    whole = resize(image, scaled)
    return whole if scaled == size else whole.crop((left, upper, left + width, upper + height))


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any mode to RGB: 16 bits are scaled to 8, floats count from 0 to 1, transparency is laid over `background`.

    Raises:
        DataError: values outside the range of the mode, or a mode Pillow cannot turn into RGB.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_rgb(image, background)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_to_rgb(image: Image.Image, background: str) -> Image.Image:
    """One channel of more than 8 bits. Pillow's own conversion clips at 255, which turns such pictures white."""
    values = np.asarray(image)  # (H, W) uint16, int32 or float32
    top = 1.0 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # written so that NaN is refused too
        raise DataError(
            f"a picture of mode {image.mode} has values from {values.min()} to {values.max()}; 0 to {top} is read. "
            "Save it with 8 or 16 bits per channel"
        )
    grey = np.rint(values * (255.0 / top)).astype(np.uint8)
    rgb = Image.fromarray(grey).convert("RGB")
    transparent = image.info.get("transparency")  # a PNG may declare one grey value transparent
    if transparent is not None:
        cover = Image.fromarray((values == transparent).astype(np.uint8) * np.uint8(255))
        rgb.paste(Image.new("RGB", rgb.size, background), mask=cover)
    return rgb


def _check_header(image: Image.Image, path: str | Path) -> None:
    # MPO is the JPEG of many phones: its further frames are previews or depth maps. Elsewhere frames are an animation.
    if image.format not in ("JPEG", "MPO") and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{path}: an animation; save the wanted frame as a picture of its own")
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:  # Pillow only warns up to twice this
        raise DataError(f"{path}: {pixels} pixels, more than the {limit} that are safe to open; scale it down")


def _orientation(image: Image.Image, path: str | Path) -> int:
    """EXIF (or XMP) orientation, before the pixels are decoded."""
    if image.format == "PNG" and "exif" not in image.info:
        exif = _exif_behind_pixels(path)
        if exif is not None:
            image.info["exif"] = exif
    # The base class's reading: the one of PNG decodes the whole picture when no EXIF came before the pixels.
    orientation: int = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation


def _exif_behind_pixels(path: str | Path) -> bytes | None:
    """The eXIf chunk of a PNG, which may come anywhere before the end (PNG third edition, 11.3.4.5)."""
    with open(path, "rb") as file:
        file.seek(8)  # signature
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, 1)  # data and checksum
    return None


def _reason(path: str | Path, error: BaseException) -> str:
    """Why a file cannot be read, in words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than the {Image.MAX_IMAGE_PIXELS} pixels that are safe to open; scale it down"
    if isinstance(error, UnidentifiedImageError):
        if Path(path).stat().st_size == 0:
            return "an empty file"
        return "not a picture, or damaged at its beginning; JPEG, PNG and WEBP are read"
    return f"cannot be read as a picture ({error})"
