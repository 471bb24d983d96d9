"""Where an edit is, from the two pictures of a pair: loss.mask_loss=difference, without a mask file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.writing import write_picture

# Differences of 0 to 255, of what lies around a pixel: below the first there is noise and compression, above the second
# an edit, and a straight line between. A change of them changes the version, and with it what is kept of them.
NOISE, EDIT = 4.0, 24.0
VERSION = 1
SPREAD = 96  # an edit reaches so far beyond its own pixels: the longer side, divided by this


def difference_map(source: Image.Image, target: Image.Image) -> Image.Image:
    """The edit as a mask, mode L, white where the pictures differ.

    The difference of a pixel is that of its most different channel. It is blurred, so that single pixels count little
    and the border of an edit belongs to it.

    Args:
        source, target: RGB, of one size.
    """
    ours, theirs = (np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in (target, source))
    apart = Image.fromarray(np.abs(ours - theirs).max(axis=-1).astype(np.uint8))
    blurred = apart.filter(ImageFilter.GaussianBlur(max(target.size) / SPREAD))
    share = (np.asarray(blurred, dtype=np.float32) - NOISE) / (EDIT - NOISE)
    return Image.fromarray((share.clip(0, 1) * 255).round().astype(np.uint8))


def map_of_row(dataset: ImageDataset, index: int) -> tuple[Image.Image, Image.Image, Image.Image] | None:
    """(source, target, map) of a row, at the size of the target; None of one without a reference."""
    example = dataset.load(index)
    if not example.references:
        return None
    source = dataset.fitted(example.references[0], example.target.size, len(example.references), example.area)
    return source, example.target, difference_map(source, example.target)


def show_maps(dataset: ImageDataset, folder: Path | None) -> str:
    """What the maps of all rows say, in a sentence; they are written to a folder, beside source and target, if given.

    Raises:
        DataError: a picture cannot be read.
        DiskFull: no space is left.
    """
    shares = []
    for index, row in enumerate(dataset.rows):
        found = map_of_row(dataset, index)
        if found is None:
            continue
        shares.append(float(np.asarray(found[2], dtype=np.float64).mean() / 255))
        if folder is not None:
            width, height = found[1].size
            strip = Image.new("RGB", (3 * width, height))
            for place, picture in enumerate(found):
                strip.paste(picture.convert("RGB"), (place * width, 0))
            file = folder / f"{row.key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_picture(file, strip)
    if not shares:
        return "loss.mask_loss=difference: no pair has a reference, so everything weighs the same"
    low, middle, high = np.quantile(shares, [0, 0.5, 1])
    where = f"; {folder} shows source, target and map of each" if folder else "; --maps FOLDER draws the maps"
    words = f"{low:.0%} to {high:.0%} of a picture is the edit, {middle:.0%} of the middle one"
    return f"loss.mask_loss=difference: {words}{where}"
