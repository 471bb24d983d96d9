"""Which part of each picture of a pair is kept, and at what size. Integers only: no picture is opened here.

A pair is cropped once, in the target: the part of every other picture is the same share of its width and height, so
that what lies on top of each other before the crop does so after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.records import Extent

Box = tuple[int, int, int, int]  # (left, upper, right, lower) in pixels, as in Pillow
Size = Callable[
    [int, int, int | None, int], Extent
]  # Family.size: (width, height, area, references) -> (width, height)
Scaled = Callable[
    [Extent, Extent, int | None, int], Extent
]  # Family.scaled: (picture, size, area, references) -> the same

SAME_ASPECT = 0.01  # relative difference up to which two pictures count as the same frame


@dataclass(frozen=True)
class Picture:
    """One file's part in a plan."""

    path: Path
    box: Box  # what is kept, in upright pixels
    size: Extent  # final size
    mirrored: bool = False  # left to right, after the crop


@dataclass(frozen=True)
class Plan:
    """What becomes of the pictures of one row at one visit."""

    target: Picture
    references: tuple[Picture, ...]
    mask: Picture | None
    area: int | None = None  # in pixels, that they are brought to; None is the model's own


@dataclass(frozen=True)
class Crop:
    """The crop that the options of a data set ask for, before any fitting to a final size."""

    center_ratio: float | None = None  # share of width and height that is kept in the middle
    window: Extent | None = None  # random window in the target's pixels; None is the largest
    scale: tuple[float, float] = (1.0, 1.0)  # range of the window's scale
    random: bool = False

    def nominal(self, extent: Extent, aspect: Extent | None) -> Extent:
        """Size of the part kept of a target, before the random scale: the same at every visit.

        Args:
            aspect: the final size where there is a fixed one: the largest window has its aspect ratio.
        """
        width, height = extent
        if self.center_ratio is not None:
            return max(1, round(width * self.center_ratio)), max(1, round(height * self.center_ratio))
        if not self.random:
            return extent
        if self.window is None:
            left, upper, right, lower = (0, 0, *extent) if aspect is None else cover((0, 0, *extent), aspect)
            return right - left, lower - upper
        shrink = min(1.0, width / self.window[0], height / self.window[1])  # a window keeps its shape
        return max(1, round(self.window[0] * shrink)), max(1, round(self.window[1] * shrink))

    def box(self, extent: Extent, nominal: Extent, draw: np.random.Generator | None) -> Box:
        """The part kept of a target: in the middle, or, if it is random, where `draw` says."""
        width, height = nominal
        if draw is None or not self.random:
            return centered((0, 0, *extent), nominal)
        scale = draw.uniform(*self.scale)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        left, upper = (int(draw.integers(0, room + 1)) for room in (extent[0] - width, extent[1] - height))
        return left, upper, left + width, upper + height


def generator(seed: int, key: str, visit: int) -> np.random.Generator:
    """Random numbers of one visit to one row: a function of its arguments, on every machine."""
    digest = hashlib.blake2b(f"{seed}\n{visit}\n{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def drawn(what: str, seed: int, key: str, visit: int, number: int) -> int:
    """One of `number` for a visit to a row: a function of its arguments, on every machine."""
    digest = hashlib.blake2b(f"{what}\n{seed}\n{visit}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % number


def centered(box: Box, extent: Extent) -> Box:
    """The middle of `box`, `extent` large."""
    left = box[0] + (box[2] - box[0] - extent[0]) // 2
    upper = box[1] + (box[3] - box[1] - extent[1]) // 2
    return left, upper, left + extent[0], upper + extent[1]


def cover(box: Box, final: Extent) -> Box:
    """The largest middle part of `box` with the aspect ratio of `final`: scaled to cover, then cropped."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width * final[1] > height * final[0]:
        return centered(box, (max(1, round(height * final[0] / final[1])), height))
    return centered(box, (width, max(1, round(width * final[1] / final[0]))))


def transfer(box: Box, source: Extent, target: Extent) -> Box:
    """The same share of a picture of another size."""
    left, right = _transfer(box[0], box[2], source[0], target[0])
    upper, lower = _transfer(box[1], box[3], source[1], target[1])
    return left, upper, right, lower


def _transfer(start: int, end: int, source: int, target: int) -> Extent:
    first, last = round(start * target / source), round(end * target / source)
    if last == first:  # thinner than a pixel there: keep one
        first = start * target // source
        last = first + 1
    return first, last


def stretched(picture: Extent, size: Extent, area: int | None, references: int) -> Extent:
    """As most families have it (`Scaled`): pictures are resized to their final size, and nothing is cut off."""
    return size


def same_aspect(first: Extent, second: Extent) -> bool:
    """Whether two pictures show the same frame, by their aspect ratios."""
    one, other = first[0] * second[1], second[0] * first[1]
    return abs(one - other) <= SAME_ASPECT * other


def fit(
    extents: Sequence[Extent],
    box: Box,
    nominal: Extent,
    size: Size,
    image_size: Extent | None,
    area: int | None,
    follow: bool = False,
    snap: Callable[[Extent], Extent] | None = None,
) -> list[tuple[Box, Extent]]:
    """(box, final size) of the target and each reference.

    Args:
        extents: upright sizes of target and references.
        box: part kept of the target by the crop options.
        nominal: size that `box` has before the random scale; final sizes follow from it, the same at every visit.
        size: the family's rule.
        image_size: final size of every target, None to keep aspect ratios.
        area: pixel area of the pictures whose aspect ratio is kept; None is the model's own.
        follow: references have the final size of the target (`Family.references_follow`).
        snap: which size of a bounded number stands for the one that a picture would have; without, none does.
    """
    target, first = extents[0], extents[1:2]
    references = len(extents) - 1
    if image_size is None and snap is not None:
        image_size = snap(final_size(size, nominal, area, references))
    kept = box if image_size is None else cover(box, image_size)
    parts = [(kept, final_size(size, nominal, area, references) if image_size is None else image_size)]
    for extent in extents[1:]:
        own = transfer(box, target, extent)
        if image_size is not None and len(parts) == 1:
            together = same_aspect(first[0], target)
            parts.append((transfer(kept, target, extent) if together else cover(own, image_size), image_size))
        elif follow:
            parts.append((own, parts[0][1]))
        else:
            share = transfer((0, 0, *nominal), target, extent)
            final = final_size(size, (share[2], share[3]), area, references)
            parts.append((own, final) if snap is None else (cover(own, snap(final)), snap(final)))
    return parts


def final_size(size: Size, extent: Extent, area: int | None, references: int) -> Extent:
    """The family's size of a picture.

    Raises:
        DataError: a side vanishes, the picture is too long and narrow.
    """
    final = size(*extent, area, references)
    if min(final) < 1:
        raise DataError(
            f"{extent[0]} x {extent[1]} pixels become {final[0]} x {final[1]}: too long and narrow; crop it"
        )
    return final
