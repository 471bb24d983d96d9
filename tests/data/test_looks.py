"""What decoded pairs tell, on portraits changed in known ways: no edit, a shift, or neither."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from qwen_image_finetune.data.images import open_upright
from qwen_image_finetune.data.looks import look, shift, unchanged

DATA = Path(__file__).parents[2] / "data"
Change = Callable[[Image.Image], Image.Image]


@pytest.fixture(params=[0, 7, 13])
def portrait(request: pytest.FixtureRequest) -> Image.Image:
    return open_upright(DATA / f"face_seg/control_images/face_{request.param:02d}.jpg")


def saved(kind: str, quality: int) -> Change:
    def change(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, kind, quality=quality)
        return Image.open(file).convert("RGB")

    return change


def scaled(factor: float) -> Change:
    return lambda picture: picture.resize((round(picture.width * factor), round(picture.height * factor)))


def noisy(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture) + np.random.default_rng(0).normal(0, 12, (picture.height, picture.width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def spotted(side: int, levels: int) -> Change:
    """A small square is darker or, where that cannot be, brighter."""

    def change(picture: Image.Image) -> Image.Image:
        pixels = np.array(picture, dtype=np.int16)
        spot = pixels[100 : 100 + side, 120 : 120 + side]
        spot += np.where(spot > 127, -levels, levels).astype(np.int16)
        return Image.fromarray(pixels.astype(np.uint8))

    return change


def with_a_hat(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    ImageDraw.Draw(picture).ellipse((70, 10, 190, 80), fill=(160, 30, 60))
    return picture


def moved(right: int, down: int) -> Change:
    """The frame moved over the picture; at (0, 0) it is in the middle."""
    return lambda picture: picture.crop((24 + right, 24 + down, picture.width - 24 + right, picture.height - 24 + down))


@pytest.mark.parametrize(
    "change",
    [Image.Image.copy, saved("JPEG", 75), saved("JPEG", 95), saved("WEBP", 95), scaled(2), scaled(1.5)],
    ids=["copy", "jpeg 75", "jpeg 95", "webp 95", "twice as large", "half as large again"],
)
def test_another_format_or_a_larger_copy_is_no_edit(portrait: Image.Image, change: Change) -> None:
    assert unchanged(portrait, change(portrait))
    assert look(portrait, change(portrait), content=b"x") == (True, 0, b"x")


EDITS: dict[str, Change] = {
    "spot": spotted(8, 30),
    "small spot": spotted(4, 80),
    "hat": with_a_hat,
    "noise": noisy,
    "blur": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
    "fewer pixels": scaled(0.5),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.05),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "colours": lambda picture: ImageEnhance.Color(picture).enhance(1.2),
    "edges": lambda picture: picture.filter(ImageFilter.FIND_EDGES),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "other shape": lambda picture: picture.crop((0, 20, picture.width, picture.height - 20)),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_neither_unchanged_nor_shifted(portrait: Image.Image, name: str) -> None:
    """Either way round: the small or noisy picture as the source of the good one is a task as well."""
    edited = EDITS[name](portrait)
    assert look(portrait, edited, content=b"") == (False, 0, b"")
    if name != "fewer pixels":  # that a picture shrinks is no task
        assert look(edited, portrait, content=b"") == (False, 0, b"")


def test_tiny_pictures_that_differ_are_not_the_same() -> None:
    first, second = (Image.new("RGB", (1, 1), colour) for colour in ("black", "white"))
    assert look(first, second, content=b"") == (False, 0, b"")
    assert look(first, first, content=b"") == (True, 0, b"")


@pytest.mark.parametrize(("right", "down"), [(5, 0), (0, -4), (-9, 6), (20, 20)])
def test_shifts_are_found_through_an_edit(portrait: Image.Image, right: int, down: int) -> None:
    source = moved(0, 0)(portrait)
    assert shift(moved(right, down)(portrait), source) == pytest.approx(math.hypot(right, down))
    edited = moved(right, down)(with_a_hat(portrait))
    assert shift(edited, source) == pytest.approx(math.hypot(right, down))


def test_shifts_of_large_pictures_are_found_on_a_coarse_grid(portrait: Image.Image) -> None:
    """In pixels of the target, also where the source has another size; less than half a step is none."""
    target, source = scaled(4)(moved(3, 0)(portrait)), scaled(2)(moved(0, 0)(portrait))
    assert shift(target, source) == pytest.approx(12)
    large = scaled(4)(portrait)
    assert shift(large.crop((1, 0, 801, 800)), large.crop((0, 0, 800, 800))) == 0


def test_pictures_without_contrast_are_not_shifted() -> None:
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("black", "grey"))
    assert shift(first, second) == 0


@pytest.mark.parametrize("folder", ["face_seg", "face_seg_held_out"])
def test_masks_and_other_portraits_have_nothing_in_common_with_a_portrait(folder: str) -> None:
    sources = [open_upright(path) for path in sorted((DATA / folder / "control_images").iterdir())]
    masks = [open_upright(path) for path in sorted((DATA / folder / "training_images").glob("*.png"))]
    assert len(sources) == len(masks) == 20
    for targets in (masks, sources[1:] + sources[:1], masks[1:] + masks[:1]):
        assert {look(*pair, content=b"") for pair in zip(targets, sources, strict=True)} == {(False, 0, b"")}
