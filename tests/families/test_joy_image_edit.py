"""What JoyAI-Image-Edit alone has: the size of the reference is that of the target, and its latents are no draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor

from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Reference
from tests.families.test_conditioning import picture

FAMILY = get_family("JoyImageEdit")


def test_sizes_are_those_of_the_pipeline() -> None:
    processor = JoyImageEditImageProcessor()
    for width, height in ((1000, 1000), (333, 777), (4000, 3000), (640, 480), (100, 900), (1920, 1080)):
        assert FAMILY.size(width, height)[::-1] == processor.get_default_height_width(None, height, width)


def test_latents_of_a_reference_are_the_middle_of_what_the_pipeline_draws(tiny_checkpoints: dict[str, Path]) -> None:
    """Its draw, with what it draws known, is our latent and the deviation of the posterior times that."""
    pipe = FAMILY.pipeline.from_pretrained(tiny_checkpoints[FAMILY.name], transformer=None)
    image = picture(64, 64, seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        _, drawn = pipe.prepare_latents(1, 16, 64, 64, 1, torch.float32, "cpu", None, torch.zeros(1), [image])
        posterior = pipe.vae.encode(FAMILY.pixels(pipe, image)).latent_dist
    torch.manual_seed(0)
    noise = torch.randn(posterior.mean.shape)
    middle = FAMILY.encode_image(pipe, image)
    scale = torch.tensor(pipe.vae.config.latents_std).view(-1, 1, 1)
    assert torch.allclose(drawn[0, 0, :, 0], middle + (posterior.std * noise)[0, :, 0] / scale, atol=1e-5)
    assert not torch.allclose(drawn[0, 0, :, 0], middle, atol=1e-2)


@pytest.mark.parametrize("shown", [False, True])
def test_a_long_prompt_is_cut_only_without_a_reference(shown: bool, tiny_checkpoints: dict[str, Path]) -> None:
    pipe = FAMILY.pipeline.from_pretrained(tiny_checkpoints[FAMILY.name], transformer=None, vae=None)
    references = [Reference(picture(64, 64), (64, 64))] if shown else []
    room = FAMILY.room(pipe, (64, 64), [((64, 64), (64, 64))] * len(references))
    long = "a " * (pipe.text_token_max_length + 8)
    tokens = len(FAMILY.encode_text(pipe, long, references)["prompt_embeds"])
    if shown:
        assert room is None and tokens > len(FAMILY.prompt_tokens(pipe, long))
    else:
        assert room is not None and room.cut and tokens == room.tokens < len(FAMILY.prompt_tokens(pipe, long))
