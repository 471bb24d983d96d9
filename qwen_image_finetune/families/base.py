"""The one interface between the trainer and a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.records import Batch


class Family(ABC):
    """One model family. Holds no weights, so caching, training and prediction share it."""

    name: ClassVar[str]  # value of train.trainer
    pipeline: ClassVar[type[DiffusionPipeline]]
    transformer: ClassVar[type[ModelMixin]]
    text_components: ClassVar[tuple[str, ...]]  # parts of the pipeline that decide the text embeddings
    text_embeddings: ClassVar[tuple[str, ...]]  # names in the result of `encode_text`
    text_sees_references: ClassVar[bool]  # the text encoder looks at the references too
    max_references: ClassVar[int]
    sizing_reference: ClassVar[int] = 0  # which of several references gives the picture its size
    side_multiple: ClassVar[int]  # sides of target and references are multiples of this, in pixels
    num_inference_steps: ClassVar[int]  # defaults of prediction
    guidance_scale: ClassVar[float]
    negative_prompt: ClassVar[str] = " "  # the pipelines' own word for "no prompt" in classifier-free guidance

    @abstractmethod
    def size(self, width: int, height: int, area: int | None = None) -> tuple[int, int]:
        """Size, in pixels, at which the pipeline sees a picture of `width` x `height`.

        Args:
            area: pixel area to scale to; None is the model's own.
        """

    @abstractmethod
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """Normalised latent (C, H, W) of an RGB picture at its final size: mode of the posterior, dtype of the VAE."""

    @abstractmethod
    def encode_text(
        self,
        pipe: DiffusionPipeline,
        prompt: str,
        references: Sequence[Image] = (),
        sizes: Sequence[tuple[int, int]] = (),
    ) -> dict[str, Tensor]:
        """Text embeddings under the family's own names, (T, D) without padding or (D,).

        Args:
            references: the pictures the prompt speaks about, at their own size; ignored unless `text_sees_references`.
            sizes: (width, height) at which the VAE sees each of them.
        """

    @abstractmethod
    def text_tokens(self, references: Sequence[tuple[int, int]]) -> int:
        """About how many tokens `encode_text` gives for a prompt of a few sentences.

        Args:
            references: (width, height) at which the VAE sees each of them.
        """

    @abstractmethod
    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        """Predicted velocity eps - x0, shape of `noisy`.

        Args:
            noisy: (B, C, H, W) noisy target latents.
            timestep: (B,) float32 in [0, 1], the noise level sigma.
            batch: references and text of the same rows; its target is not read.
            guidance: value of the guidance embedding; None for checkpoints that have none.
        """

    @abstractmethod
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        """Pictures of normalised latents (B, C, H, W)."""

    @abstractmethod
    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline combines it; all (B, C, H, W)."""

    def distilled_guidance(self, transformer_config: Mapping[str, Any]) -> bool:
        """Whether `guidance_scale` goes into the model (an embedding) instead of a second, unconditional pass."""
        return bool(transformer_config["guidance_embeds"])

    def mu(self, tokens: int, scheduler_config: Mapping[str, Any]) -> float:
        """Log of the timestep shift for `tokens` target tokens, linear between the scheduler's own two points.

        Source: `calculate_shift` of the pipelines.
        """
        base_tokens = scheduler_config.get("base_image_seq_len", 256)
        max_tokens = scheduler_config.get("max_image_seq_len", 4096)
        base_shift, max_shift = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
        slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        return float(tokens * slope + (base_shift - slope * base_tokens))

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Number of transformer tokens of a latent (..., H, W)."""
        return (latent_shape[-2] // 2) * (latent_shape[-1] // 2)

    @abstractmethod
    def tiny(self, folder: Path) -> None:
        """Write a tiny random checkpoint of the real architecture, in diffusers layout, for tests and the demo."""


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C), channels of a token in the order (c, row, column)."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack` for a latent of `height` x `width`."""
    batch, _, channels = tokens.shape
    tokens = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(batch, channels // 4, height, width)


def concatenate_tokens(noisy: Tensor, references: Sequence[Tensor]) -> Tensor:
    """The image sequence [noisy target | reference 1 | ...], each (B, C, H, W) packed: (B, tokens, 4 C)."""
    return torch.cat([pack(noisy), *(pack(reference.to(noisy.dtype)) for reference in references)], dim=1)
