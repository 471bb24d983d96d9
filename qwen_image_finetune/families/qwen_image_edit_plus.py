"""Qwen-Image-Edit-Plus (2509, 2511): several references, each shown to the language model at its own smaller size.

Oracle: `diffusers.QwenImageEditPlusPipeline`. What distinguishes 2511 (references modulated at timestep 0,
`zero_cond_t`) stands in the checkpoint's transformer configuration and is the transformer's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.families.qwen_image_edit import QwenImageEdit
from qwen_image_finetune.families.tiny import tiny_qwen_image_edit


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit 2509 and 2511; up to three references, as they were trained."""

    name = "QwenImageEditPlus"
    pipeline = QwenImageEditPlusPipeline
    max_references = 3
    sizing_reference = -1  # as the pipeline does

    @torch.no_grad()
    def encode_text(
        self,
        pipe: DiffusionPipeline,
        prompt: str,
        references: Sequence[Image] = (),
        sizes: Sequence[tuple[int, int]] = (),
    ) -> dict[str, Tensor]:
        """Last hidden state (T, D) behind the template's system text.

        Every reference, resized from the original to an area of 384 x 384, stands before the prompt as "Picture i".
        """
        pictures = []
        for reference in references:
            width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, reference.width / reference.height)
            pictures.append(pipe.image_processor.resize(reference, height, width))
        embeds, _ = pipe.encode_prompt(prompt, image=pictures or None, device=pipe.text_encoder.device)
        return {"prompt_embeds": embeds[0]}

    def text_tokens(self, references: Sequence[tuple[int, int]]) -> int:
        seen = [plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, width / height) for width, height in references]
        return super().text_tokens(seen)

    def tiny(self, folder: Path) -> None:
        tiny_qwen_image_edit(folder, QwenImageEditPlusPipeline, zero_cond_t=True)
