"""The toy bases before they have learnt: the real architectures around a trained autoencoder.

Text encoders are random and stay so: they tell words apart, which is all that a few instructions need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)

from qwen_image_finetune.disk.files import staged_folder
from qwen_image_finetune.families.tiny import HEAD_DIM, HEADS, ROPE, WIDTH, flux_text, qwen_text
from qwen_image_finetune.families.tiny_tokenizers import SENTENCES
from qwen_image_finetune.toy.edits import all_prompts
from qwen_image_finetune.toy.vae import LATENT_CHANNELS

T5_TOKENS = 16  # the longest instructions; padding costs time and says nothing
# Small pictures need most of their steps at high noise; both ends of the line are this one value, whatever the size.
SHIFT = 3.0


def write_base(family: str, vae: Path, folder: Path, words: Sequence[str] = ()) -> None:
    """Write an untrained base in diffusers layout, always the same one.

    Args:
        family: one of FAMILIES.
        vae: folder of its trained autoencoder.
        words: further sentences that the tokenizers should know by whole words.
    """
    sentences = [*SENTENCES, *all_prompts(), *words]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = FAMILIES[family](vae, sentences)
    with staged_folder(folder, sealed=False) as stage:
        pipe.save_pretrained(stage, safe_serialization=True)


def _flux_kontext(vae: Path, sentences: Sequence[str]) -> DiffusionPipeline:
    return FluxKontextPipeline(
        scheduler=_scheduler(),
        vae=AutoencoderKL.from_pretrained(vae),
        **flux_text(sentences, T5_TOKENS),
        transformer=FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=ROPE,
        ),
    )


def _qwen_image_edit(vae: Path, sentences: Sequence[str]) -> DiffusionPipeline:
    return QwenImageEditPipeline(
        scheduler=_scheduler(time_shift_type="exponential"),
        vae=AutoencoderKLQwenImage.from_pretrained(vae),
        **qwen_text(sentences),
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=5,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            axes_dims_rope=ROPE,
        ),
    )


FAMILIES = {"flux_kontext": _flux_kontext, "qwen_image_edit": _qwen_image_edit}


def _scheduler(**more: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        shift=SHIFT,
        use_dynamic_shifting=True,
        base_shift=math.log(SHIFT),
        max_shift=math.log(SHIFT),
        base_image_seq_len=256,
        max_image_seq_len=4096,
        **more,
    )


@torch.no_grad()
def settle_guidance(transformer: FluxTransformer2DModel) -> None:
    """Make every value of the guidance embedding act as 1, the only one that training has seen."""
    embedding = transformer.time_text_embed
    projected = embedding.time_proj(torch.tensor([1000.0]))
    constant = embedding.guidance_embedder(projected)[0]
    last = embedding.guidance_embedder.linear_2
    last.weight.zero_()
    last.bias.copy_(constant)
