"""Pictures to files: whole or not at all, with a word in them that says who drew them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin

from qwen_image_finetune.data.images import to_rgb
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.reading import MEBIBYTE, Unreadable, read_regular

SOFTWARE = "qwen-image-finetune"
LARGEST, NEAR = 1024 * MEBIBYTE, 1024
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # format by the ending of the name


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture in the format of its ending. Transparency, which JPEG has not, is laid over white there.

    Raises:
        DiskFull: no space is left; `path` is as it was.
    """
    content, kind = io.BytesIO(), WRITTEN[path.suffix.lower()]
    if kind == "PNG":
        about = PngImagePlugin.PngInfo()
        about.add_text("Software", SOFTWARE)
        picture.save(content, kind, pnginfo=about)
    else:
        picture = to_rgb(picture) if kind == "JPEG" else picture
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = SOFTWARE
        picture.save(content, kind, exif=exif)
    write_atomic(path, content.getvalue())


def is_drawn(path: Path) -> bool:
    """Whether `write_picture` wrote a file: its word stands near the beginning, in WebP near the end."""
    try:
        content = read_regular(path, LARGEST)
    except (OSError, Unreadable):
        return False
    return SOFTWARE.encode() in content[:NEAR] + content[-NEAR:]
