"""Qwen-Image-Edit-Plus (2509, 2511): several references, each shown to the language model at its own smaller size.

Oracle: `diffusers.QwenImageEditPlusPipeline`. What distinguishes 2511 (references modulated at timestep 0,
`zero_cond_t`) stands in the checkpoint's transformer configuration and is the transformer's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.families.base import Asked, Published, Reference, replaced
from qwen_image_finetune.families.qwen_image_edit import QwenImageEdit, write_tiny
from qwen_image_finetune.records import Extent


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit 2509 and 2511; up to three references, as they were trained."""

    name = "QwenImageEditPlus"
    pipeline = QwenImageEditPlusPipeline
    max_references = 3
    sizing_reference = -1  # as the pipeline does
    published: ClassVar[tuple[Published, ...]] = (
        Published("Qwen/Qwen-Image-Edit-2509", 8.42e9, "Apache 2.0", {}, 7.15e9),
        Published("Qwen/Qwen-Image-Edit-2511", 8.42e9, "Apache 2.0", {"zero_cond_t": True}, 7.15e9),
    )

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """Last hidden state (T, D) behind the template's system text.

        Every reference, resized from the original to an area of 384 x 384, stands before the prompt as "Picture i".
        """
        pictures = []
        for reference, _ in references:
            width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, reference.width / reference.height)
            pictures.append(pipe.image_processor.resize(reference, height, width))
        embeds, _ = pipe.encode_prompt(prompt, image=pictures or None, device=pipe.text_encoder.device)
        return {"prompt_embeds": embeds[0]}

    def seen(self, picture: Extent, size: Extent) -> Extent:
        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, picture[0] / picture[1])
        return width, height

    def text_tokens(self, references: Sequence[Extent]) -> int:
        seen = [plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, width / height) for width, height in references]
        return super().text_tokens(seen)

    def tiny(self, folder: Path) -> None:
        """As 2511."""
        write_tiny(folder, self.pipeline, zero_cond_t=True)

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        with replaced(plus, "VAE_IMAGE_SIZE", asked.area):
            drawn: Image = pipe(
                image=list(asked.references),
                **asked.options,
                true_cfg_scale=asked.guidance,
                negative_prompt=self.negative_prompt,
            ).images[0]
        return drawn
