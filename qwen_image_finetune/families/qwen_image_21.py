"""Qwen-Image-2.1: single-stream, block-causal transformer, Qwen3-VL text that looks at the references, RGBA VAE.

Oracle: `diffusers.QwenImage21Pipeline`, which draws from the prompt alone too. One sequence: the prompt, in which each
reference takes the place of what the language model saw of it, then the target. Text and references are modulated at
timestep 0 (`causal_condition` in the checkpoint's transformer configuration, the transformer's own affair).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    ModelMixin,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as pipeline_21
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_dimensions
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.families.base import Asked, Family, Published, Reference, replaced
from qwen_image_finetune.families.packing import one_by_one
from qwen_image_finetune.families.qwen_image_edit import tiny_scheduler
from qwen_image_finetune.lora.names import Names, Native
from qwen_image_finetune.lora.readers import EVERYTHING, Reader
from qwen_image_finetune.records import Batch, Extent

MODEL_AREA = 1024 * 1024
SLOT_SIDE = 32  # pixels of a side of what is one token to the language model, and 2 x 2 latents to the transformer
LATENTS_OF_A_SLOT = 4
WORDS = 64  # tokens of a prompt of a few sentences, and of what the template has around it


class QwenImage21(Family):
    """Qwen-Image-2.1; up to ten references."""

    name = "QwenImage21"
    pipeline = QwenImage21Pipeline
    transformer = QwenImage21Transformer2DModel
    text_components = ("text_encoder", "processor")
    always_loaded = ("processor",)
    text_embeddings = ("prompt_embeds", "image_slots")
    text_sees_references = True
    max_references = 10
    sizing_reference = -1  # as the pipeline does
    side_multiple = 32
    token_side = 1
    num_inference_steps = 40
    guidance_scale = 1.0
    # Of diffusers, which was asked; what ComfyUI and kohya's tools make of it is not known.
    lora_readers = (Reader("diffusers", "diffusers"), Reader("diffusers", "comfy"),
                    Reader("diffusers", "kohya", EVERYTHING))  # fmt: skip
    vae_pixel_bytes = 2132
    published: ClassVar[tuple[Published, ...]] = (
        Published("Qwen/Qwen-Image-2.1", 9.1e9, "Qwen Research, non-commercial", {}, 7.48e9),
    )

    @property
    def file_names(self) -> Names:
        """ComfyUI's files have the two upper layers of the feed-forward in one matrix; its LoRAs are not known to."""
        block = "transformer_blocks.{}.img_mlp"
        return {f"{block}.gate_up": Native((f"{block}.gate_layer", f"{block}.proj"), rows=(1, 1))}

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """The aspect ratio kept at `area` (the model's: 1024 x 1024), sides rounded to 32."""
        width, height, _ = calculate_dimensions(area or MODEL_AREA, width / height)
        return max(width, SLOT_SIDE), max(height, SLOT_SIDE)

    def pixels(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """A film of one frame with an opaque alpha channel, (1, 4, 1, H, W)."""
        return super().pixels(pipe, image.convert("RGBA")).unsqueeze(2)

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """(64, H/16, W/16): (mode - latents_mean) / latents_std per channel."""
        pixels = self.pixels(pipe, image).to(pipe.vae.device, pipe.vae.dtype)
        latent: Tensor = pipe._encode_vae_image(pixels, generator=None)[0, :, 0]
        return latent

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """States (T, D) before the language model's last norm, behind the system text; and the slots of references.

        `image_slots` (S,) is 1 for each of the first tokens that stands for 2 x 2 latents of a reference, else 0. It
        ends with the last of them: the references stand before the prompt, so rows of one geometry share it.

        Raises:
            ValueError: the language model saw a reference at another size, as it does with very small ones.
        """
        pictures = [pipe.image_processor.resize(picture, height, width) for picture, (width, height) in references]
        embeds, _, seen = pipe.encode_prompt(prompt, image=pictures or None, device=pipe.text_encoder.device)
        sizes = [size for _, size in references]
        if int(seen.sum()) != _slots(sizes):
            raise ValueError(
                f"the language model of {self.name} sees references of {sizes} (width, height) pixels as "
                f"{int(seen.sum())} tokens in place of {_slots(sizes)}: its processor takes no pictures as small or as "
                "large as these; set data.init_args.resolution nearer to 1024"
            )
        places = seen[0].nonzero()
        end = int(places[-1]) + 1 if len(places) else 0
        return {"prompt_embeds": embeds[0], "image_slots": seen[0, :end].long()}

    def text_tokens(self, references: Sequence[Extent]) -> int:
        """The language model sees the references: they are most of it."""
        return WORDS + _slots(references)

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        """One row after the other: where the target stands follows from the length of the prompt, and the transformer
        reads that from its first row.
        """
        return torch.cat([self._alone(transformer, *row) for row in one_by_one(noisy, timestep, batch)])

    def _alone(self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        text, slots = batch.text["prompt_embeds"], batch.text["image_slots"].bool()
        pictures, tokens = [*batch.references, noisy], self.tokens(noisy.shape)
        words = slots.new_zeros(1, text.shape[1] - slots.shape[1])
        target = slots.new_ones(1, tokens // LATENTS_OF_A_SLOT)
        predicted: Tensor = transformer(
            hidden_states=torch.cat([picture.flatten(2).transpose(1, 2) for picture in pictures], dim=1),
            timestep=timestep,
            encoder_hidden_states=text,
            img_shapes=[[(1, *picture.shape[-2:]) for picture in pictures]],
            img_mask=torch.cat([slots, words, target], dim=1),
            return_dict=False,
        )[0]
        return predicted[:, -tokens:].transpose(1, 2).reshape(noisy.shape)

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        """Pictures with an alpha channel."""
        vae = pipe.vae
        latents = latents.to(vae.device, vae.dtype).unsqueeze(2)

        def per_channel(values: Sequence[float]) -> Tensor:
            return torch.tensor(values).view(1, vae.config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)

        latents = latents * per_channel(vae.config.latents_std) + per_channel(vae.config.latents_mean)
        pixels = vae.decode(latents, return_dict=False)[0][:, :, 0]
        pictures: list[Image] = pipe.image_processor.postprocess(pixels)
        return pictures

    def distilled_guidance(self, transformer_config: Mapping[str, Any]) -> bool:
        return False

    def latent_shape(
        self, width: int, height: int, transformer_config: Mapping[str, Any], vae_scale_factor: int | None = None
    ) -> tuple[int, int, int]:
        pixels = vae_scale_factor or self.side_multiple // 2
        return transformer_config["in_channels"], height // pixels, width // pixels

    def text_shape(self, name: str, tokens: int, transformer_config: Mapping[str, Any]) -> tuple[int, ...]:
        return (tokens,) if name == "image_slots" else (tokens, transformer_config["context_in_dim"])

    def stand_in_text(
        self, tokens: int, references: Sequence[tuple[int, ...]], transformer_config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The slots first, then words."""
        slots = sum(map(self.tokens, references)) // LATENTS_OF_A_SLOT
        shape = self.text_shape("prompt_embeds", max(tokens, slots + 1), transformer_config)
        return {"prompt_embeds": torch.zeros(shape), "image_slots": torch.ones(slots, dtype=torch.int64)}

    def tiny(self, folder: Path) -> None:
        """3 blocks, a Qwen3-VL that sees pictures, latents 64 x f16."""
        from qwen_image_finetune.families import tiny

        tiny.write_once(folder, {"pipeline": self.pipeline.__name__}, tiny_pipeline)

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        # Its cache of keys and values adds up in another order, as its documentation says: equal to some bits only.
        with replaced(pipeline_21, "calculate_dimensions", lambda _, ratio: calculate_dimensions(asked.area, ratio)):
            drawn: Image = pipe(
                image=list(asked.references) or None,
                **asked.options,
                true_cfg_scale=asked.guidance,
                negative_prompt=self.negative_prompt,
                use_kv_cache=False,
            ).images[0]
        return drawn


def _slots(sizes: Sequence[Extent]) -> int:
    """Tokens of the language model that stand for pictures of these (width, height)."""
    return sum((width // SLOT_SIDE) * (height // SLOT_SIDE) for width, height in sizes)


def tiny_pipeline() -> QwenImage21Pipeline:
    """The pipeline that `QwenImage21.tiny` writes."""
    from qwen_image_finetune.families import tiny

    transformer = QwenImage21Transformer2DModel(
        num_layers=3,
        attention_head_dim=tiny.HEAD_DIM,
        num_attention_heads=tiny.HEADS,
        context_in_dim=tiny.WIDTH,
        axes_dims_rope=tiny.ROPE,
    )
    return QwenImage21Pipeline(
        scheduler=tiny_scheduler(),
        vae=tiny.film_vae(AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8, num_res_blocks=1)),
        **tiny.qwen3_text(),
        transformer=tiny.sharpen(tiny.randomise(transformer, seed=3)),
    )
