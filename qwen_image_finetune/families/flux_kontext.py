"""FLUX.1 Kontext: double- and single-stream transformer, CLIP + T5 text, guidance embedding.

Oracle: `diffusers.FluxKontextPipeline`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxTransformer2DModel, ModelMixin
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.families.base import Family, concatenate_tokens, unpack
from qwen_image_finetune.families.tiny import tiny_flux_kontext
from qwen_image_finetune.records import Batch

MAX_PROMPT_TOKENS = 512


class FluxKontext(Family):
    """FLUX.1 Kontext [dev]."""

    name = "FluxKontext"
    pipeline = FluxKontextPipeline
    transformer = FluxTransformer2DModel
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_embeddings = ("prompt_embeds", "pooled_prompt_embeds")
    text_sees_references = False
    max_references = 8
    side_multiple = 16
    num_inference_steps = 28
    guidance_scale = 3.5

    def size(self, width: int, height: int, area: int | None = None) -> tuple[int, int]:
        """The nearest of the 17 preferred resolutions; at another area, the aspect ratio in multiples of 16."""
        ratio = width / height
        if area is None:
            _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        else:
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        multiple = self.side_multiple
        return max(width // multiple, 1) * multiple, max(height // multiple, 1) * multiple

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """(16, H/8, W/8): (mode - shift_factor) * scaling_factor."""
        pixels = pipe.image_processor.preprocess(image).to(pipe.vae.device, pipe.vae.dtype)
        latent: Tensor = pipe._encode_vae_image(pixels, generator=None)[0]
        return latent

    @torch.no_grad()
    def encode_text(
        self,
        pipe: DiffusionPipeline,
        prompt: str,
        references: Sequence[Image] = (),
        sizes: Sequence[tuple[int, int]] = (),
    ) -> dict[str, Tensor]:
        """T5 states (512, D), padding included and not masked, as the model was trained; pooled CLIP state (P,).

        A checkpoint whose T5 tokenizer says that its prompts are shorter gets what it says.
        """
        length = min(MAX_PROMPT_TOKENS, pipe.tokenizer_2.model_max_length)
        embeds, pooled, _ = pipe.encode_prompt(prompt, device=pipe.text_encoder_2.device, max_sequence_length=length)
        return {"prompt_embeds": embeds[0], "pooled_prompt_embeds": pooled[0]}

    def text_tokens(self, references: Sequence[tuple[int, int]]) -> int:
        return MAX_PROMPT_TOKENS

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        text = batch.text["prompt_embeds"]
        ids = [image_ids(0, noisy), *(image_ids(i, reference) for i, reference in enumerate(batch.references, start=1))]
        predicted: Tensor = transformer(
            hidden_states=concatenate_tokens(noisy, batch.references),
            timestep=timestep,
            guidance=None if guidance is None else torch.full_like(timestep, guidance, dtype=torch.float32),
            pooled_projections=batch.text["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        return unpack(predicted[:, : self.tokens(noisy.shape)], height, width)

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        latents = latents.to(pipe.vae.device, pipe.vae.dtype)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pictures: list[Image] = pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0])
        return pictures

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        return unconditional + scale * (conditional - unconditional)

    def tiny(self, folder: Path) -> None:
        tiny_flux_kontext(folder)


def image_ids(index: int, latent: Tensor) -> Tensor:
    """Position ids (tokens, 3) of one picture: (index, row, column). The target is 0, references count from 1.

    The pipeline knows one reference, with index 1; further ones continue its count, so that ids never overlap.
    """
    height, width = latent.shape[-2] // 2, latent.shape[-1] // 2
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, height, width, latent.device, latent.dtype)
    ids[..., 0] = index
    return ids
