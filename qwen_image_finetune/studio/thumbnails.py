"""Small pictures, made once and kept. The folder `thumbs` may be deleted at any time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from qwen_image_finetune.data.images import DataError, open_upright
from qwen_image_finetune.disk.files import hidden
from qwen_image_finetune.studio.shelf import Refused, Shelf

SIDES = (160, 320, 640)  # longest sides in pixels
QUALITY = 82  # of WebP
AT_ONCE = 4  # pictures decoded at a time: each may take hundreds of megabytes


class Thumbnails:
    """Small versions of the pictures on a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self.folder = shelf, shelf.own / "thumbs"
        self._turns = threading.Semaphore(AT_ONCE)

    def of(self, name: str, side: int) -> Path:
        """The file with a small version of the picture `name`, at most `side` pixels wide and high.

        Raises:
            Refused: there is no such picture, or it cannot be read.
        """
        if side not in SIDES:
            raise Refused(f"pictures are made {', '.join(map(str, SIDES))} pixels large")
        path = self.shelf.picture(name)
        return self.kept(path, str(side), lambda: small(path, side))

    def kept(self, path: Path, what: str, make: Callable[[], Image.Image]) -> Path:
        """A picture that was made of the file `path` as it is now; `what` tells several of one file apart."""
        stat = path.stat()
        told = f"{path}\n{stat.st_mtime_ns}\n{stat.st_size}\n{what}".encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(told).hexdigest()
        file = self.folder / digest[:2] / f"{digest[2:32]}.webp"
        if not file.is_file() or not file.stat().st_size:
            with self._turns:
                try:
                    image = make()
                except DataError as error:
                    raise Refused(str(error)) from error
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = hidden(file, "partial")  # not flushed to the disk: it can be made again
                try:
                    image.save(partial, "WEBP", quality=QUALITY)
                    os.replace(partial, file)
                finally:
                    partial.unlink(missing_ok=True)
        return file


def small(path: Path, side: int) -> Image.Image:
    """A picture, upright, scaled down to fit a square of `side` pixels; a smaller one stays as it is."""
    image = open_upright(path)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image
