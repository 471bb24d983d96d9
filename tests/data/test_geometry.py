"""Boxes and sizes as properties; the oracle is exact arithmetic with fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_finetune.data.geometry import Box, Crop, cover, fit, generator, same_aspect, transfer
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.records import Extent

quick = settings(max_examples=100, deadline=None)
extents = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def size(width: int, height: int, area: int | None, references: int = 1) -> Extent:
    """A family's rule: the aspect ratio kept, sides in multiples of 16, model's own area 256 x 256."""
    scale = math.sqrt((area or 256 * 256) / (width * height))
    return round(width * scale / 16) * 16, round(height * scale / 16) * 16


def inside(box: Box, extent: Extent) -> bool:
    return 0 <= box[0] < box[2] <= extent[0] and 0 <= box[1] < box[3] <= extent[1]


@quick
@given(extents, extents)
def test_cover_is_the_largest_middle_part(extent: Extent, final: Extent) -> None:
    box = cover((0, 0, *extent), final)
    width, height = box[2] - box[0], box[3] - box[1]
    assert inside(box, extent)
    assert width == extent[0] or height == extent[1]
    assert abs(box[0] - (extent[0] - box[2])) <= 1
    assert abs(box[1] - (extent[1] - box[3])) <= 1
    # Within half a pixel of the exact aspect ratio, or one pixel where it would be thinner than that.
    exact = min(Fraction(extent[0], final[0]), Fraction(extent[1], final[1]))
    assert abs(width - final[0] * exact) <= Fraction(1, 2) or width == 1
    assert abs(height - final[1] * exact) <= Fraction(1, 2) or height == 1


@quick
@given(extents, extents, st.data())
def test_transfer_keeps_the_share(source: Extent, target: Extent, data: st.DataObject) -> None:
    left, upper = data.draw(st.integers(0, source[0] - 1)), data.draw(st.integers(0, source[1] - 1))
    box = (left, upper, data.draw(st.integers(left + 1, source[0])), data.draw(st.integers(upper + 1, source[1])))
    moved = transfer(box, source, target)
    assert inside(moved, target)
    for place in range(4):
        assert abs(moved[place] - Fraction(box[place] * target[place % 2], source[place % 2])) <= 1
    assert transfer(box, source, source) == box
    assert transfer((0, 0, *source), source, target) == (0, 0, *target)


@quick
@given(extents, st.integers(0, 50), st.one_of(st.none(), extents), st.one_of(st.none(), extents))
def test_a_random_window_stays_inside_and_keeps_its_shape(
    extent: Extent, visit: int, window: Extent | None, aspect: Extent | None
) -> None:
    crop = Crop(random=True, window=window, scale=(0.5, 0.9))
    nominal = crop.nominal(extent, aspect)
    box = crop.box(extent, nominal, generator(7, "key", visit))
    assert inside(box, extent)
    for side, given_side in zip((box[2] - box[0], box[3] - box[1]), nominal, strict=True):
        assert 0.5 * given_side - 0.5 <= side <= max(1, 0.9 * given_side + 0.5)
    if window is not None and min(nominal) > 1:
        shrink = min(Fraction(1), Fraction(extent[0], window[0]), Fraction(extent[1], window[1]))
        assert all(abs(side - given_side * shrink) <= 1 for side, given_side in zip(nominal, window, strict=True))
    assert box == crop.box(extent, nominal, generator(7, "key", visit))


def test_random_windows_reach_every_place_evenly() -> None:
    """Corners of a 3 x 3 window in a 5 x 4 picture: 6 places, chi-square with 5 degrees of freedom."""
    crop = Crop(random=True, window=(3, 3))
    boxes = [crop.box((5, 4), (3, 3), generator(0, "key", visit)) for visit in range(1200)]
    counts = [boxes.count((left, upper, left + 3, upper + 3)) for left in range(3) for upper in range(2)]
    assert sum(counts) == 1200
    assert sum((count - 200) ** 2 / 200 for count in counts) < 25.7  # p = 1e-4


def test_draws_follow_seed_key_and_visit() -> None:
    draws = [generator(*which).integers(2**62) for which in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]]
    assert len(set(draws)) == 4
    assert generator(0, "a", 0).integers(2**62) == draws[0]
    assert generator(3, "gesicht_ä", 5).integers(2**62) == 870303940463933164  # the same on every machine


def test_center() -> None:
    crop = Crop(center_ratio=0.5)
    assert crop.nominal((100, 61), None) == (50, 30)
    assert crop.box((100, 61), (50, 30), None) == (25, 15, 75, 45)
    assert crop.box((1, 1), crop.nominal((1, 1), None), None) == (0, 0, 1, 1)


def whole(extent: Extent) -> Box:
    return 0, 0, *extent


def test_without_a_fixed_size_every_picture_follows_the_family_whole() -> None:
    pictures = [(400, 300), (300, 400), (1000, 1000)]
    assert fit(pictures, whole(pictures[0]), pictures[0], size, None, None) == [
        (whole(extent), size(*extent, None)) for extent in pictures
    ]
    assert fit(pictures, whole(pictures[0]), pictures[0], size, None, 512**2)[2] == (whole((1000, 1000)), (512, 512))


def test_a_fixed_size_crops_target_and_first_reference_alike() -> None:
    # 400 x 300 to a square: the middle 300 columns; a reference twice as large loses the same share.
    parts = fit([(400, 300), (800, 600), (800, 600)], whole((400, 300)), (400, 300), size, (64, 64), 64 * 64)
    assert parts[0] == ((50, 0, 350, 300), (64, 64))
    assert parts[1] == ((100, 0, 700, 600), (64, 64))
    assert parts[2] == (whole((800, 600)), size(800, 600, 64 * 64))


@pytest.mark.parametrize(("height", "together"), [(300, True), (302, True), (298, True), (310, False), (600, False)])
def test_a_reference_of_another_shape_is_cropped_on_its_own(height: int, together: bool) -> None:
    assert same_aspect((400, height), (400, 300)) == together
    (target, _), (reference, final) = fit([(400, 300), (400, height)], whole((400, 300)), (400, 300), size, (96, 64), 1)
    expected = transfer(target, (400, 300), (400, height)) if together else cover(whole((400, height)), (96, 64))
    assert (reference, final) == (expected, (96, 64))


@pytest.mark.parametrize("image_size", [None, (96, 64)])
def test_references_that_follow_have_the_size_of_their_target(image_size: Extent | None) -> None:
    pictures = [(400, 300), (300, 400), (900, 300)]
    parts = fit(pictures, whole((400, 300)), (400, 300), size, image_size, None, follow=True)
    assert {final for _, final in parts} == {size(400, 300, None) if image_size is None else image_size}
    assert image_size is not None or [part for part, _ in parts] == [whole(extent) for extent in pictures]


@quick
@given(extents, st.lists(extents, max_size=3), st.one_of(st.none(), st.just((64, 96))))
def test_crops_cut_the_same_share_out_of_every_picture(
    target: Extent, references: list[Extent], image_size: Extent | None
) -> None:
    crop = Crop(center_ratio=0.6)
    nominal = crop.nominal(target, image_size)
    box = crop.box(target, nominal, None)
    parts = fit(
        [target, *references], box, nominal, lambda width, height, area, references: (width, height), image_size, None
    )
    for extent, (part, final) in zip([target, *references], parts, strict=True):
        own = transfer(box, target, extent)
        assert inside(part, extent)
        assert part == own if image_size is None else own[0] - 1 <= part[0] and part[2] <= own[2] + 1
        if image_size is None:  # the size the family is asked for is that of what is kept
            assert abs(final[0] - (part[2] - part[0])) <= 1
            assert abs(final[1] - (part[3] - part[1])) <= 1


def test_a_side_that_vanishes_is_refused() -> None:
    with pytest.raises(DataError, match=r"9000 x 4 pixels become .* x 0: too long and narrow"):
        fit([(9000, 4)], whole((9000, 4)), (9000, 4), size, None, None)
