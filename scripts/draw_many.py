"""Pictures of a toy base for many references at once; the other scripts use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from qwen_image_finetune import loading
from qwen_image_finetune.data.images import resize
from qwen_image_finetune.drawing.predict import Conditions, Guidance, Predictor
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora import files as lora_files
from qwen_image_finetune.records import collate


def open_base(family: str, folder: Path, side: int) -> Predictor:
    """A base ready to draw squares of `side` pixels in float32; `family` is a value of train.trainer."""
    chosen = get_family(family)
    pipe = loading.load_encoders(chosen, folder, torch.float32, {"default": "cpu"})
    transformer = loading.load_transformer(chosen, folder, torch.float32).eval()
    return Predictor(chosen, pipe, transformer, loading.load_scheduler(folder), side * side)


@torch.no_grad()
def draw(
    predictor: Predictor, wanted: Sequence[tuple[Image.Image, str]], steps: int, seed: int = 0
) -> list[Image.Image]:
    """One picture for each (reference, prompt), all of one size, without guidance; seeds count up from `seed`.

    Equal to drawing them one by one with `Predictor.predict(..., guidance_scale=1)`.
    """
    rows = [predictor.encode(prompt, [picture], predictor.size(picture)) for picture, prompt in wanted]
    embedded = 1.0 if predictor.family.distilled_guidance(predictor.transformer.config) else None
    seeds = range(seed, seed + len(rows))
    latents = predictor.sample(Conditions(collate(rows)), Guidance(embedded), seeds, steps)
    return predictor.family.decode(predictor.pipe, latents)


@torch.no_grad()
def through_vae(predictor: Predictor, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures as the autoencoder gives them back: nothing drawn can come nearer."""
    sized = [resize(picture, predictor.size(picture)) for picture in pictures]
    latents = torch.stack([predictor.family.encode_image(predictor.pipe, picture) for picture in sized])
    return predictor.family.decode(predictor.pipe, latents)


def add_lora(predictor: Predictor, lora: Path) -> None:
    """Draw with a LoRA from now on."""
    lora_files.load_lora(predictor.transformer, lora, predictor.family.naming, None)
