"""Editing instructions: the answer differs from the picture in what is asked for, and in nothing else."""

import numpy as np
import pytest
from PIL import ImageOps

from qwen_image_finetune.toy.edits import COLOURS, EDITS, HELD_OUT_SEED, all_prompts, draw_pair, shuffled_names
from qwen_image_finetune.toy.faces import BACKGROUND, FACE, HAIR, HAT, Wish, classes, draw_face

SIZE = 64
DRAWN = {name: [draw_pair(name, HELD_OUT_SEED, index, SIZE) for index in range(6)] for name in EDITS}


def changed(one: object, other: object) -> np.ndarray:
    """Where two pictures differ visibly, (H, W)."""
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max(axis=-1) > 12


def labels(seed: int, wish: Wish) -> np.ndarray:
    return classes(np.asarray(draw_face(np.random.default_rng(seed), SIZE, wish)[1]))


def test_there_are_instructions_enough_in_several_wordings_and_segmenting_is_none_of_them() -> None:
    assert len(EDITS) >= 10
    assert all(len(set(edit.wordings)) >= 3 for edit in EDITS.values())
    assert not [prompt for prompt in all_prompts() if "segment" in prompt or "mask" in prompt or "{" in prompt]


def test_same_seed_same_pair_and_another_seed_another_picture() -> None:
    for name in EDITS:
        first, again, other = (draw_pair(name, seed, 0, SIZE) for seed in (5, 5, 6))
        assert first.prompt == again.prompt
        assert np.array_equal(first.before, again.before)
        assert np.array_equal(first.after, again.after)
        assert not np.array_equal(first.before, other.before)


@pytest.mark.parametrize("name", [name for name in EDITS if name != "keep"])
def test_the_answer_is_another_picture(name: str) -> None:
    assert sum(changed(pair.before, pair.after).any() for pair in DRAWN[name]) >= 5  # a scene may be its own mirror


def test_answers_that_pixels_decide() -> None:
    for pair in DRAWN["keep"]:
        assert np.array_equal(pair.before, pair.after)
    for pair in DRAWN["mirror"]:
        assert np.array_equal(np.asarray(pair.before)[:, ::-1], pair.after)
    for pair in DRAWN["invert"]:
        assert np.array_equal(255 - np.asarray(pair.before), pair.after)
    for pair in DRAWN["grey"]:
        assert np.array_equal(ImageOps.grayscale(pair.before).convert("RGB"), pair.after)


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        (Wish(), Wish(background=COLOURS["red"]), {BACKGROUND}),
        (Wish(hat="none"), Wish(hat="plain"), {HAT}),
        (Wish(hat="any"), Wish(hat="none"), {HAT}),
        (Wish(hat="any"), Wish(hat="any", hat_colour=COLOURS["blue"]), {HAT}),
        (Wish(), Wish(shirt=COLOURS["yellow"]), {BACKGROUND}),
        (Wish(hat="none"), Wish(hat="none", hair=COLOURS["green"]), {HAIR, FACE}),  # brows are hair on the face
    ],
)
def test_a_wish_changes_its_part_and_no_other(before: Wish, after: Wish, parts: set[int]) -> None:
    for seed in range(8):
        pictures = [draw_face(np.random.default_rng(seed), SIZE, wish)[0] for wish in (before, after)]
        inside = np.isin(labels(seed, before), list(parts)) | np.isin(labels(seed, after), list(parts))
        # The edge of a part shares pixels with its neighbours: give it one pixel.
        grown = np.pad(inside, 1)
        near = np.any([np.roll(grown, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)[1:-1, 1:-1]
        different = changed(*pictures)
        assert different.any()
        assert (different & ~near).sum() <= 3  # pixels between two spikes of hair


def test_shares_decide_how_often_an_instruction_comes() -> None:
    names = shuffled_names(0, 4000)
    assert names == shuffled_names(0, 4000)
    counts = {name: names.count(name) for name in EDITS}
    assert 2.4 < counts["hair"] / counts["mirror"] < 3.8
