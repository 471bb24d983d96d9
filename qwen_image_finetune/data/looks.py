"""What the decoded pictures of a pair tell about it: the same picture twice, a target that is shifted, a copy.

The limits were measured on sixteen photographs and scans that come with scikit-image and on pairs of data/face_seg.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL.Image import Image, Resampling

from qwen_image_finetune.data.geometry import same_aspect
from qwen_image_finetune.data.hashes import both_ways
from qwen_image_finetune.data.images import DataError, open_upright

Grey = NDArray[np.float32]  # (H, W)

# Largest and mean difference of brightness, then of colour (Cb, Cr), in blocks of 8 x 8 pixels, of 255. JPEG down to
# quality 75 and WebP down to 80 keep the means of blocks better than this, since they store them; a change of 4 x 4
# pixels by 60 levels does not, nor does noise of 10 levels, a blur of one pixel or 3 % more brightness.
_BLOCK = 8
_SAME = (3, 0.62, 9, 0.7)
_SAME_LARGEST, _QUIET = 2, 0.2  # a format that changes single blocks by more than this changes all a little

_GRID = 256  # longest side on which shifts are looked for: one step is 4 pixels of a picture of 1024
_LEAST_GRID = 32  # shorter sides say too little
# Pairs shifted by 6 pixels of 1024 or more have a peak of 0.2 and ten times that of no shift, and come to lie on each
# other with 0.6 of the difference or less; where they were edited as well, more is left, but most have a peak above
# 0.6. Edits in place have their peak at no shift; different pictures have no peak; mirrored ones may have one of 0.36,
# but differ after the shift nearly as much as before.
_PEAK, _BESIDE, _LEFT = 0.18, 1 / 3, 0.7
_CERTAIN = 0.6  # a peak that needs no other proof


class Look(NamedTuple):
    """What is found in a row's decoded pictures."""

    unchanged: bool  # the first reference and the target are one picture, at most saved in another format
    shift: float  # how far the target is shifted against the first reference, in its pixels; 0 if it is not
    content: bytes  # equal for rows that are copies of each other, whatever their files are called


class Stamp(NamedTuple):
    """A picture in little, to find pictures that look alike."""

    hashes: tuple[int, int]  # `both_ways`
    colours: bytes  # 8 x 8 pixels of RGB


class Decoded(NamedTuple):
    """What reading a row's pictures to their end shows."""

    problems: list[str]
    remarks: list[str]  # what was converted or passed over beside the pixels
    look: Look | None = None  # where there are no problems
    stamps: tuple[Stamp, ...] = ()  # of the target and the first reference


def decode(paths: Sequence[str], masked: bool, prompt: str) -> Decoded:
    """Read the pictures of a row, every file once.

    Args:
        paths: files of the target, the references, and the mask if the row is `masked`.
    """
    problems: list[str] = []
    remarks: list[str] = []
    pair: list[Image] = []  # target and first reference; no more pictures are kept in memory
    content = xxhash.xxh3_128(prompt.encode("utf-8", "surrogatepass"))
    for place, path in enumerate(paths):
        is_mask = masked and place == len(paths) - 1
        try:
            picture = open_upright(path, is_mask, remarks)
        except DataError as error:
            problems += error.problems
            continue
        if is_mask and picture.convert("L").getextrema()[1] == 1:
            problems.append(f"{path}: the brightest value of this mask is 1; white, 255, is foreground")
        content.update(f"{picture.size}".encode() + picture.tobytes())
        if place <= 1 and not is_mask:
            pair.append(picture)
    if problems:
        return Decoded(problems, remarks)
    return Decoded([], remarks, look(*pair, content=content.digest()), tuple(map(stamp, pair)))


def stamp(picture: Image) -> Stamp:
    """In little, to be kept while all pictures of a data set are looked at."""
    return Stamp(both_ways(picture), picture.resize((8, 8), Resampling.BOX).tobytes())


def look(target: Image, source: Image | None = None, *, content: bytes) -> Look:
    """Compare a target (RGB) with its first reference (RGB), where it has one that shows the same frame."""
    if source is None or not same_aspect(source.size, target.size):
        return Look(False, 0.0, content)
    if unchanged(target, source):
        return Look(True, 0.0, content)
    return Look(False, shift(target, source), content)


def unchanged(target: Image, source: Image) -> bool:
    """Whether nothing happened from source to target but another format or a smaller size.

    A target larger than its source may have more detail: that can be learned. So can any small edit, which is why
    blocks are compared, not pictures of the size of a stamp.
    """
    if source.width < target.width or source.height < target.height:
        return False
    if source.size != target.size:
        source = source.resize(target.size, Resampling.LANCZOS)
    block = min(_BLOCK, max(1, min(target.size) // _BLOCK))
    ours, theirs = (np.asarray(picture.reduce(block).convert("YCbCr"), dtype=np.int16) for picture in (target, source))
    difference = np.abs(ours - theirs)  # (H, W, 3)
    brightness, colour = difference[..., 0], difference[..., 1:]
    found = (brightness.max(), brightness.mean(), colour.max(), colour.mean())
    if found[1] < _QUIET and found[0] > _SAME_LARGEST:
        return False
    return all(value <= limit for value, limit in zip(found, _SAME, strict=True))


def shift(target: Image, source: Image) -> float:
    """Pixels by which the whole target is shifted, by phase correlation (Kuglin & Hines 1975); 0 if it is not.

    In whole steps of a coarse grid, with numpy alone: every pair of a data set goes through here. Measures of drawn
    pictures are finer, see `metrics`.
    """
    step = max(1, -(-max(target.size) // _GRID))
    if source.size != target.size:
        source = source.resize(target.size, Resampling.BILINEAR, reducing_gap=2.0)
    ours, theirs = (np.asarray(picture.reduce(step).convert("L"), dtype=np.float32) for picture in (target, source))
    if min(ours.shape) < _LEAST_GRID or not ours.std() or not theirs.std():
        return 0.0
    surface = _phases(ours, theirs)
    row, column = np.unravel_index(int(surface.argmax()), surface.shape)
    peak = float(surface[row, column])
    down, right = (
        (int(place) + side // 2) % side - side // 2 for place, side in zip((row, column), surface.shape, strict=True)
    )
    if peak < _PEAK or float(surface[0, 0]) > _BESIDE * peak:
        return 0.0
    before = _difference(ours, theirs, 0, 0)
    if peak < _CERTAIN and _difference(ours, theirs, down, right) > _LEFT * before:
        return 0.0
    return step * float(np.hypot(down, right))


def _phases(ours: Grey, theirs: Grey) -> Grey:
    """How well two pictures agree at every shift, (H, W): 1 at the place of a pure shift."""
    window = np.outer(*(np.hanning(side) for side in ours.shape)).astype(np.float32)  # edges are no features
    one, other = (np.fft.rfft2((grey - grey.mean()) * window) for grey in (ours, theirs))
    cross = one * other.conj()
    size = np.abs(cross)
    return np.fft.irfft2(cross / (size + 1e-6 * size.max()), s=ours.shape).astype(np.float32)


def _difference(ours: Grey, theirs: Grey, down: int, right: int) -> float:
    """Mean difference where both pictures are, one shifted, both brought to the same brightness and contrast."""
    one, other = _rest(ours, down, right), _rest(theirs, -down, -right)
    one, other = ((grey - grey.mean()) / max(float(grey.std()), 1e-6) for grey in (one, other))
    return float(np.abs(one - other).mean())


def _rest(grey: Grey, down: int, right: int) -> Grey:
    """What is left of a picture when it is moved out of its frame to the other side."""
    height, width = grey.shape
    return grey[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
