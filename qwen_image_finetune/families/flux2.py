"""FLUX.2 [dev]: klein's transformer with a guidance embedding; three inner states of Mistral 3 are the text.

Oracle: `diffusers.Flux2Pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
)

from qwen_image_finetune.families.base import Published, Reference, quiet
from qwen_image_finetune.families.flux2_klein import MAX_PROMPT_TOKENS, TINY_LANGUAGE, Flux2Klein, tiny_parts

# Of Mistral 3, as far as prompts need it.
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
                  "[IMG]", "[IMG_BREAK]", "[IMG_END]")  # fmt: skip
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' }}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{{ '[/SYSTEM_PROMPT]' if message.role == 'system' else '[/INST]' }}{% endfor %}"
)


class Flux2(Flux2Klein):
    """FLUX.2 [dev], 32B."""

    name = "Flux2"
    pipeline = Flux2Pipeline
    max_references = 6  # by the authors' documentation of editing
    published: ClassVar[tuple[Published, ...]] = (
        Published("black-forest-labs/FLUX.2-dev", 24.1e9, "FLUX non-commercial", encoder_quantisable=22.6e9),
    )

    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        with quiet("transformers.processing_utils"):  # which complains of each call as the pipeline makes it
            return super().encode_text(pipe, prompt, references)

    def around(self, pipe: DiffusionPipeline) -> int:
        with quiet("transformers.processing_utils"):
            (chat,) = pipe.tokenizer.apply_chat_template(
                format_input([""], SYSTEM_MESSAGE), add_generation_prompt=False, tokenize=True, return_dict=True
            )["input_ids"]
        return len(chat)

    def prompt_length(self, pipe: DiffusionPipeline) -> int:
        return min(MAX_PROMPT_TOKENS, pipe.tokenizer.tokenizer.model_max_length)

    def tiny(self, folder: Path) -> None:
        """2 double and 2 single blocks, latents 128 x f16, a Mistral 3 of 31 layers, guidance embedding."""
        from qwen_image_finetune.families import tiny

        identity = {"pipeline": self.pipeline.__name__}
        tiny.write_once(folder, identity, lambda: self.pipeline(**tiny_parts(guidance_embeds=True), **tiny_mistral()))


def tiny_mistral() -> dict[str, Any]:
    """Processor and language model of the checkpoint that `Flux2.tiny` writes."""
    from qwen_image_finetune.families import tiny, tiny_tokenizers

    words = tiny_tokenizers.qwen_tokenizer((*tiny_tokenizers.SENTENCES, SYSTEM_MESSAGE))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, model_max_length=64)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = SPECIAL_TOKENS[:3]
    processor = PixtralProcessor(
        PixtralImageProcessor(), tokenizer, patch_size=14, spatial_merge_size=2, chat_template=CHAT_TEMPLATE
    )
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": 31, **TINY_LANGUAGE},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    encoder = tiny.randomise(Mistral3ForConditionalGeneration(config), seed=2)
    return {"text_encoder": encoder, "tokenizer": processor}
