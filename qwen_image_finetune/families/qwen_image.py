"""Qwen-Image: text to image. Transformer, text encoder and VAE are those of Qwen-Image-Edit, without references.

Oracle: `diffusers.QwenImagePipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from diffusers import DiffusionPipeline, QwenImagePipeline

from qwen_image_finetune.families.base import Published, References, Room
from qwen_image_finetune.families.qwen_image_edit import WORDS, QwenImageEdit
from qwen_image_finetune.records import Extent


class QwenImage(QwenImageEdit):
    """Qwen-Image, of August 2025 and of December (2512)."""

    name = "QwenImage"
    pipeline = QwenImagePipeline
    text_components = ("text_encoder", "tokenizer")
    text_sees_references = False
    max_references = 0
    edit_family = "QwenImageEditPlus"
    num_inference_steps = 50
    published: ClassVar[tuple[Published, ...]] = (
        Published("Qwen/Qwen-Image", 8.42e9, "Apache 2.0"),
        Published("Qwen/Qwen-Image-2512", 8.42e9, "Apache 2.0"),
    )

    def room(self, pipe: DiffusionPipeline, target: Extent, references: References) -> Room:
        """The pipeline's cut."""
        return Room(pipe.tokenizer_max_length, cut=True)

    def text_tokens(self, references: Sequence[Extent]) -> int:
        return WORDS
