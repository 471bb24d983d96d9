"""JoyAI-Image-Edit-Plus: double-stream transformer, Qwen3-VL text that looks at the references, Wan's VAE.

Oracle: `diffusers.JoyImageEditPlusPipeline`, which draws from the prompt alone too. One sequence of latent patches, the
target first, then the references, each at its own size; the transformer counts them along its time axis. Guidance takes
both prompts through the transformer in one batch, so that each sees the padding of the other, which is masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    ModelMixin,
)
from diffusers.pipelines.joyimage import image_processor as processing
from PIL.Image import Image, Resampling
from torch import Tensor

from qwen_image_finetune.families.base import Asked, Family, Published, Reference, replaced
from qwen_image_finetune.lora.readers import EVERYTHING, Reader
from qwen_image_finetune.records import Batch, Extent

SLOT_SIDE = 32  # pixels of a side of what is one token to the language model, and 2 x 2 patches to the transformer
MODEL_SIDE = 1024
SHOWN = "<image>\n"  # what the pipeline takes for the place of a picture
LONGEST_TEXT = 4096  # tokens, pictures among them; the pipeline keeps the last ones
WORDS = 64  # tokens of a prompt of a few sentences, and of what the template has around it
PUBLISHED = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 40, "theta": 10000}


class JoyImageEditPlus(Family):
    """JoyAI-Image-Edit-Plus; up to six references, as its authors say."""

    name = "JoyImageEditPlus"
    pipeline: ClassVar[type[DiffusionPipeline]] = JoyImageEditPlusPipeline
    transformer: ClassVar[type[ModelMixin]] = JoyImageEditPlusTransformer3DModel
    text_components = ("text_encoder", "tokenizer", "processor")
    text_embeddings = ("prompt_embeds",)
    text_sees_references = True
    max_references = 6
    sizing_reference = -1  # as the pipeline does
    side_multiple = 32
    num_inference_steps = 30
    guidance_scale = 4.0
    resampling = Resampling.BILINEAR
    scheduler_levels = True
    guides_in_one_pass = True
    adapter_targets = ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj")
    # Of ComfyUI, whose modules have diffusers' names; diffusers has no loader of LoRA files for this pipeline.
    lora_readers = (
        Reader("ComfyUI", "diffusers", EVERYTHING), Reader("ComfyUI", "comfy"), Reader("ComfyUI", "kohya"),
        *(Reader("diffusers", dialect, EVERYTHING) for dialect in ("diffusers", "comfy", "kohya")),
    )  # fmt: skip
    published: ClassVar[tuple[Published, ...]] = (
        Published("jdopensource/JoyAI-Image-Edit-Plus-Diffusers", 8.9e9, "Apache 2.0", PUBLISHED, 7.48e9),
    )

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """The size nearest in ratio of those near a megapixel that the model was trained at.

        At another `area` they are scaled to it, sides rounded to 32.
        """
        ratio = height / width
        return min(_sizes(area), key=lambda size: abs(size[1] / size[0] - ratio))

    def scaled(self, picture: Extent, size: Extent, area: int | None = None, references: int = 1) -> Extent:
        """`JoyImageEditImageProcessor.resize_center_crop`: scaled to cover `size`."""
        scale = max(size[1] / picture[1], size[0] / picture[0])
        return math.ceil(picture[0] * scale), math.ceil(picture[1] * scale)

    def pixels(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """A film of one frame, (1, 3, 1, H, W).

        Without the pipeline's `preprocess`, which would bring it to one of the model's own sizes once more.
        """
        processor = pipe.image_processor
        pixels: Tensor = processor.normalize(processor.numpy_to_pt(processor.pil_to_numpy(image)))
        return pixels.unsqueeze(2)

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """(16, H/8, W/8): (mode - latents_mean) / latents_std per channel, of a film of one frame."""
        latent = pipe.vae.encode(self.pixels(pipe, image).to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
        mean, std = _normalisation(pipe, latent)
        normal: Tensor = ((latent - mean) / std)[0, :, 0]
        return normal

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """States (T, D) of the language model's last layer, before its last norm, behind the system text.

        It sees each reference as the VAE does, before the prompt.
        """
        pictures = [pipe.image_processor.resize_center_crop(picture, size[::-1]) for picture, size in references]
        words = f"<|im_start|>user\n{SHOWN * len(pictures)}{prompt}<|im_end|>\n"
        embeds, _ = pipe.encode_prompt_multiple_images(
            words, images=pictures or None, device=pipe.text_encoder.device, max_sequence_length=LONGEST_TEXT
        )
        return {"prompt_embeds": embeds[0]}

    def text_tokens(self, references: Sequence[Extent]) -> int:
        """The language model sees the references: they are most of it."""
        return WORDS + sum((width // SLOT_SIDE) * (height // SLOT_SIDE) for width, height in references)

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        text, mask = batch.text["prompt_embeds"], batch.text_masks.get("prompt_embeds")
        pictures = (noisy, *(reference.to(noisy.dtype) for reference in batch.references))
        shapes = [(1, picture.shape[-2] // 2, picture.shape[-1] // 2) for picture in pictures]
        predicted: Tensor = transformer(
            hidden_states=torch.cat([_patches(picture) for picture in pictures], dim=1),
            timestep=timestep * 1000,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=torch.ones_like(text[..., 0], dtype=torch.int64) if mask is None else mask,
            shape_list=[shapes] * len(noisy),
            return_dict=False,
        )[0]
        return _picture(predicted[:, : self.tokens(noisy.shape)], noisy.shape)

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        latents = latents.to(pipe.vae.device, pipe.vae.dtype).unsqueeze(2)
        mean, std = _normalisation(pipe, latents)
        pixels = pipe.vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0].float()
        pictures: list[Image] = pipe.image_processor.postprocess(pixels)
        return pictures

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Guidance whose latents keep the norm over channels of the conditional prediction."""
        combined = unconditional + scale * (conditional - unconditional)
        # Channels last, as they lie in what the transformer gives the pipeline: a norm's last bit depends on it.
        norms = [one.movedim(1, -1).contiguous().norm(dim=-1).unsqueeze(1) for one in (conditional, combined)]
        return combined * (norms[0] / norms[1].clamp_min(1e-6))

    def distilled_guidance(self, transformer_config: Mapping[str, Any]) -> bool:
        return False

    def latent_shape(
        self, width: int, height: int, transformer_config: Mapping[str, Any], vae_scale_factor: int | None = None
    ) -> tuple[int, int, int]:
        return transformer_config["in_channels"], height // 8, width // 8

    def text_shape(self, name: str, tokens: int, transformer_config: Mapping[str, Any]) -> tuple[int, ...]:
        return tokens, transformer_config["text_dim"]

    def tiny(self, folder: Path) -> None:
        """3 blocks, a Qwen3-VL that sees pictures, latents 16 x f8."""
        from qwen_image_finetune.families import tiny

        identity = {"pipeline": self.pipeline.__name__}
        tiny.write_once(folder, identity, lambda: tiny_pipeline(self.pipeline, self.transformer))

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        def nearest(height: int, width: int, base: int) -> tuple[int, int]:
            return self.size(width, height, asked.area)[::-1]

        with replaced(processing, "find_best_bucket", nearest):
            drawn: Image = pipe(
                images=list(asked.references) or None, **asked.options, guidance_scale=asked.guidance
            ).images[0]
        return drawn


@cache
def _sizes(area: int | None) -> tuple[Extent, ...]:
    """(width, height) that pictures are brought to at an area, one of each ratio; None is the model's own."""
    found: dict[float, tuple[int, int]] = {}
    for height, width in processing.BUCKETS[MODEL_SIDE]:
        size = (width, height)
        if area is not None:
            sides = (side * math.sqrt(area) / MODEL_SIDE for side in size)
            size = tuple(max(round(side / SLOT_SIDE), 1) * SLOT_SIDE for side in sides)
        found.setdefault(size[1] / size[0], size)
    return tuple(found.values())


def _normalisation(pipe: DiffusionPipeline, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, of films (B, C, frames, H, W)."""
    values = (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    mean, std = (torch.tensor(one).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype) for one in values)
    return mean, std


def _patches(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, C, 1, 2, 2)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, -1, channels, 1, 2, 2)


def _picture(patches: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `_patches` for latents of `shape`."""
    batch, channels, height, width = shape
    patches = patches.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def tiny_pipeline(pipeline: type[DiffusionPipeline], transformer_class: type[ModelMixin]) -> DiffusionPipeline:
    """The pipeline that `JoyImageEditPlus.tiny` writes."""
    from qwen_image_finetune.families import tiny

    transformer = transformer_class(
        hidden_size=tiny.HEADS * tiny.HEAD_DIM,
        num_attention_heads=tiny.HEADS,
        text_dim=tiny.WIDTH,
        num_layers=3,
        rope_dim_list=list(tiny.ROPE),
        theta=PUBLISHED["theta"],
    )
    text = tiny.qwen3_text()
    return pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae=tiny.film_vae(AutoencoderKLWan(base_dim=8, num_res_blocks=1)),
        tokenizer=text["processor"].tokenizer,
        **text,
        transformer=tiny.sharpen(tiny.randomise(transformer, seed=3)),
    )
