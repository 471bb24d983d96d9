"""What training and prediction feed the transformer equals, to the last bit, what diffusers' own pipelines feed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image

from qwen_image_finetune import loading
from qwen_image_finetune.families import FAMILIES, get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.predict import Predictor
from qwen_image_finetune.records import collate

AREA = 128 * 96
PROMPT = "turn it into a sketch"
FAMILY_NAMES = sorted(FAMILIES)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return get_family(request.param)


@pytest.fixture(scope="module")
def pipe(family: Family, tiny_checkpoints: dict[str, Path]) -> DiffusionPipeline:
    pipe = family.pipeline.from_pretrained(tiny_checkpoints[family.name])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def predictor(family: Family, pipe: DiffusionPipeline, tiny_checkpoints: dict[str, Path]) -> Predictor:
    scheduler = loading.load_scheduler(tiny_checkpoints[family.name])
    return Predictor(family, pipe, pipe.transformer, scheduler, AREA)


@contextmanager
def calls_of(transformer: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Every keyword argument the transformer is called with."""
    seen: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()})

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def run_pipeline(
    family: Family, pipe: DiffusionPipeline, image: Image.Image, width: int, height: int, steps: int = 3, **kwargs: Any
) -> Image.Image:
    """The pipeline's picture, with its hard-coded megapixel set to the test's area."""
    common = dict(prompt=PROMPT, width=width, height=height, num_inference_steps=steps,
                  generator=torch.Generator().manual_seed(7))  # fmt: skip
    if family.name == "FluxKontext":
        reference = image.resize(family.size(*image.size, AREA), Image.Resampling.LANCZOS)
        length = pipe.tokenizer_2.model_max_length  # that of the full-size checkpoint is the pipeline's default, 512
        sizes = dict(max_area=width * height, _auto_resize=False, max_sequence_length=length)
        return pipe(image=reference, **sizes, **common, **kwargs).images[0]
    original = pipeline_qwenimage_edit.calculate_dimensions
    with patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: original(AREA, ratio)):
        return pipe(image=image, **common, **kwargs).images[0]


def assert_same_calls(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        for name in their.keys() - {"return_dict", "attention_kwargs", "joint_attention_kwargs"}:
            expected, given = their[name], our.get(name)
            if isinstance(expected, torch.Tensor):
                assert given.dtype == expected.dtype and torch.equal(given, expected), name
            else:
                assert given == expected, name


def options(family: Family) -> dict[str, Any]:
    return {"guidance_scale": 2.5} if family.name == "FluxKontext" else {"negative_prompt": " ", "true_cfg_scale": 4.0}


@pytest.mark.parametrize("image_size,output", [((128, 96), (128, 96)), ((150, 210), (96, 128)), ((300, 100), (160, 96))])
def test_prediction_equals_the_pipeline_pixel_for_pixel(
    family: Family, pipe: DiffusionPipeline, predictor: Predictor, image_size: tuple[int, int], output: tuple[int, int]
) -> None:
    image = picture(*image_size)
    width, height = output
    scale = 2.5 if family.name == "FluxKontext" else 4.0
    with calls_of(pipe.transformer) as theirs:
        expected = run_pipeline(family, pipe, image, width, height, **options(family))
    with calls_of(pipe.transformer) as ours:
        drawn = predictor.predict(image, PROMPT, 3, guidance_scale=scale, width=width, height=height, seed=7)
    assert_same_calls(ours, theirs)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(expected))
    assert np.asarray(expected).std() > 1, "a constant picture proves nothing"
