"""FLUX.1: text to image. Transformer, text encoders and VAE are those of FLUX.1 Kontext, without references.

Oracle: `diffusers.FluxPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, FluxPipeline
from PIL.Image import Image

from qwen_image_finetune.families.base import Asked, Defaults, Published
from qwen_image_finetune.families.flux_kontext import FluxKontext, prompt_length
from qwen_image_finetune.records import Extent

MODEL_AREA = 1024 * 1024


class Flux(FluxKontext):
    """FLUX.1 [dev]; [schnell] is the same, distilled to few steps, without the embedding of guidance."""

    name = "Flux"
    pipeline = FluxPipeline
    max_references = 0
    edit_family = "FluxKontext"
    published: ClassVar[tuple[Published, ...]] = (
        Published("black-forest-labs/FLUX.1-dev", 4.97e9, "FLUX.1 [dev] non-commercial", {"guidance_embeds": True}),
        Published("black-forest-labs/FLUX.1-schnell", 4.97e9, "Apache 2.0", {"guidance_embeds": False}),
    )

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """The aspect ratio kept at `area` (the pipeline's: 1024 x 1024), in multiples of 16."""
        return super().size(width, height, area or MODEL_AREA)

    def defaults(self, pipeline_config: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> Defaults:
        """[schnell] draws in four steps."""
        if transformer_config["guidance_embeds"]:
            return super().defaults(pipeline_config, transformer_config)
        return Defaults(4, 1.0)

    def distilled(self, pipeline_config: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        if transformer_config["guidance_embeds"]:
            return None
        return (
            "this checkpoint has no guidance embedding, like FLUX.1-schnell, which is distilled to four steps: "
            "training undoes that. Train on FLUX.1-dev"
        )

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        picture: Image = pipe(
            **asked.options,
            guidance_scale=asked.guidance,
            max_sequence_length=prompt_length(pipe),
        ).images[0]
        return picture
