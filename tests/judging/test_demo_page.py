"""The page of `qif demo`: what it counts, against pictures whose overlap is known by construction."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from qwen_image_finetune.judging import demo_page
from qwen_image_finetune.judging.pages.reading import Sample


def mask(width: int) -> Image.Image:
    """A mask whose left `width` columns of eight are face."""
    picture = Image.new("RGB", (8, 8))
    picture.paste((255, 200, 0), (0, 0, width, 8))
    return picture


def test_scores_are_means_over_the_pictures_of_an_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    drawn = {"base": (1, 2), "copy of the input": (8, 8), "checkpoint-1-8 x 1": (4, 3)}
    for name, widths in {**drawn, "truth": (4, 4)}.items():
        (folder / name).mkdir(parents=True)
        for place, width in enumerate(widths):
            mask(width).save(folder / name / f"{place}.png")
    candidates = [{"name": name, "pictures": [{"file": f"{name}/{place}.png"} for place in range(2)]} for name in drawn]
    (folder / "evaluation.json").write_text(json.dumps({"candidates": candidates}))
    assert demo_page.scores(tmp_path) == pytest.approx(((1 / 4 + 2 / 4) / 2, (4 / 4 + 3 / 4) / 2))


def test_what_is_learnt_over_time_begins_with_the_base() -> None:
    samples = [
        Sample("a", "", {"reference": mask(8), "base": mask(1), "truth": mask(4)}, {10: mask(2), 20: mask(4)}, {}),
        Sample("b", "", {"reference": mask(8), "base": mask(8), "truth": mask(4)}, {10: mask(4), 20: mask(4)}, {}),
    ]
    assert demo_page.overlaps(samples) == [(0, 3 / 8), (10, 3 / 4), (20, 1.0)]


def test_a_row_for_each_face_and_the_steps_spread_over_the_run() -> None:
    drawn = {step: mask(4) for step in range(10, 130, 10)}
    page = demo_page.filmstrip([Sample("a<b", "", {"reference": mask(8), "truth": mask(4)}, drawn, {})])
    assert re.findall(r'<th scope="col">([^<]+)', page) == [
        "face", "base alone", "step 10", "step 40", "step 70", "step 90", "step 120", "true mask",
    ]  # fmt: skip
    assert page.count("<img ") == 7 and "a<b" not in page
