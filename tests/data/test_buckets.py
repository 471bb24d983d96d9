"""A bounded number of sizes: the best choice by trying all of them, and what becomes of pictures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.data.buckets import chosen, lost, nearest
from qwen_image_finetune.data.geometry import cover
from qwen_image_finetune.encoding.pairs import open_pairs
from qwen_image_finetune.families import get_family

Size = tuple[int, int]


def total(counts: dict[Size, int], kept: list[Size]) -> float:
    return sum(count * lost(size, nearest(size, kept)) for size, count in counts.items())


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.tuples(st.integers(1, 12), st.integers(1, 12)), st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_no_other_choice_loses_less(counts: dict[Size, int], most: int) -> None:
    kept = chosen(counts, most)
    assert len(kept) <= most and set(kept) <= counts.keys()
    every = (list(some) for some in combinations(counts, min(most, len(counts))))
    assert total(counts, kept) == pytest.approx(min(total(counts, some) for some in every), abs=1e-12)


def test_what_is_lost_is_what_a_crop_cuts_off() -> None:
    for size, bucket in {(400, 300): (100, 100), (300, 400): (160, 90), (64, 64): (32, 32)}.items():
        left, upper, right, lower = cover((0, 0, *size), bucket)
        assert lost(size, bucket) == pytest.approx(1 - (right - left) * (lower - upper) / (size[0] * size[1]), abs=0.01)


def test_pictures_of_a_bounded_number_of_sizes(
    configure: Callable[..., Config], write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """A pair is cropped alike to the nearest size, at each of its resolutions, and `check` says what that costs."""
    shapes = [(128, 64)] * 3 + [(120, 64), (64, 64), (64, 60), (64, 128)]
    folder = write_pairs(tmp_path / "shapes", shapes, references=2)
    options = (f"data.init_args.dataset_path={folder}", "data.init_args.resolution=[64, 96]")
    family = get_family("Flux2")
    free = open_pairs(configure("Flux2", *options), family).training
    bound = open_pairs(configure("Flux2", *options, "data.init_args.max_buckets=2"), family).training
    own = {free.geometry(row, visit)[0] for row in range(7) for visit in range(2)}
    kept = {size for row in range(7) for visit in range(2) for size in bound.geometry(row, visit)}
    assert len(own) > 4 == len(kept) and kept <= own
    wide = free.geometry(0)
    assert bound.geometry(0) == wide and bound.geometry(3) == wide  # the most frequent shape, and its neighbour
    plan = bound.plan(3)
    assert plan.target.box == plan.references[0].box == cover((0, 0, 120, 64), wide[0])
    example = bound.load(3, 1)
    assert {example.target.size, *example.reference_sizes} <= kept
    notes = [note for note in bound.notes if "data.init_args.max_buckets" in note]
    assert [note.partition(" sizes in place of ")[0] for note in notes] == [
        "targets at 96 have 2",
        "targets at 64 have 2",
    ]
    with pytest.raises(ConfigError, match=r"max_buckets=2 and data\.init_args\.streaming=true exclude each other"):
        configure("Flux2", "data.init_args.max_buckets=2", "data.init_args.streaming=true")
