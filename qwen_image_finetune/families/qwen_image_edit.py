"""Qwen-Image-Edit: double-stream transformer, Qwen2.5-VL text that looks at the reference, causal 3-D VAE.

Oracle: `diffusers.QwenImageEditPipeline`; without a reference, `diffusers.QwenImagePipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.families.base import (
    Asked,
    Family,
    Published,
    Reference,
    References,
    Room,
    plain_tokens,
    replaced,
)
from qwen_image_finetune.families.packing import concatenate_tokens, pack, unpack
from qwen_image_finetune.records import Batch, Extent

MODEL_AREA = 1024 * 1024
SEEN_SIDE = 28  # pixels of a side of what is one token to the language model
LONGEST_RATIO = 200  # of the sides of a picture that the language model is shown (transformers' smart_resize)
POSITIONS = 4096  # in the table of the transformer (QwenEmbedRope)
SHOWN = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"  # before a prompt, where the template has no picture
WORDS = 64  # tokens of a prompt of a few sentences, and of what the template has behind it


class QwenImageEdit(Family):
    """Qwen-Image-Edit, the first release: one reference."""

    name = "QwenImageEdit"
    pipeline = QwenImageEditPipeline
    transformer = QwenImageTransformer2DModel
    text_components: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "processor")
    text_embeddings = ("prompt_embeds",)
    text_sees_references = True
    max_references = 1
    side_multiple = 16
    num_inference_steps = 40
    guidance_scale = 4.0
    published: ClassVar[tuple[Published, ...]] = (Published("Qwen/Qwen-Image-Edit", 8.42e9, "Apache 2.0", {}, 7.15e9),)

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """The aspect ratio kept at `area` (the model's: 1024 x 1024), sides rounded to 32."""
        width, height, _ = calculate_dimensions(area or MODEL_AREA, width / height)
        return max(width, 32), max(height, 32)

    def pixels(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """A film of one frame, (1, 3, 1, H, W)."""
        return super().pixels(pipe, image).unsqueeze(2)

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """(16, H/8, W/8): (mode - latents_mean) / latents_std per channel, of a film of one frame."""
        pixels = self.pixels(pipe, image).to(pipe.vae.device, pipe.vae.dtype)
        latent: Tensor = pipe.vae.encode(pixels).latent_dist.mode()[0]
        mean, std = (
            torch.tensor(values).view(-1, 1, 1, 1).to(latent.device, latent.dtype)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        return ((latent - mean) / std)[:, 0]

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """Last hidden state (T, D) behind the template's system text.

        The language model sees the reference at the size the VAE sees it. Without a reference the prompt goes through
        the text-to-image template, on which the base model was trained.
        """
        device = pipe.text_encoder.device
        if not references:
            embeds, _ = text_to_image(pipe).encode_prompt(prompt, device=device)
            return {"prompt_embeds": embeds[0]}
        ((reference, (width, height)),) = references
        picture = pipe.image_processor.resize(reference, height, width)
        embeds, _ = pipe.encode_prompt(prompt, image=picture, device=device)
        return {"prompt_embeds": embeds[0]}

    def reference_fault(self, picture: Extent, size: Extent) -> str | None:
        """The picture processor of the language model refuses slivers."""
        return sliver_fault(picture, self.seen(picture, size))

    def seen(self, picture: Extent, size: Extent) -> Extent:
        """(width, height) at which the language model sees a reference; see `reference_fault`."""
        return size

    def room(self, pipe: DiffusionPipeline, target: Extent, references: References) -> Room:
        """The positions of the transformer that pictures and template leave; without references, the pipeline's cut."""
        if not references and "{}" in pipe.prompt_template_encode and "image_pad" in pipe.prompt_template_encode:
            return Room(text_to_image(pipe).tokenizer_max_length, cut=True)
        start = max(max(size) // (2 * self.side_multiple) for size in (target, *(size for _, size in references)))
        processor = pipe.processor.image_processor
        seen = [self.seen(*reference) for reference in references]
        patches = sum(processor.get_number_of_image_patches(height, width, {}) for width, height in seen)
        before = "" if "image_pad" in pipe.prompt_template_encode else SHOWN * len(references)
        around = len(plain_tokens(pipe.tokenizer, pipe.prompt_template_encode.format(before)))
        behind = around - pipe.prompt_template_encode_start_idx - len(references) + patches // processor.merge_size**2
        return Room(POSITIONS - start - behind, cut=False)

    def text_tokens(self, references: Sequence[Extent]) -> int:
        """The language model sees the references: they are most of it."""
        return WORDS + sum(round(width / SEEN_SIDE) * round(height / SEEN_SIDE) for width, height in references)

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        shapes = [(1, picture.shape[-2] // 2, picture.shape[-1] // 2) for picture in (noisy, *batch.references)]
        predicted: Tensor = transformer(
            hidden_states=concatenate_tokens(noisy, batch.references),
            timestep=timestep,
            guidance=None if guidance is None else torch.full_like(timestep, guidance, dtype=torch.float32),
            encoder_hidden_states=batch.text["prompt_embeds"],
            encoder_hidden_states_mask=batch.text_masks.get("prompt_embeds"),
            img_shapes=[shapes] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(predicted[:, : self.tokens(noisy.shape)], height, width)

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        vae = pipe.vae
        latents = latents.to(vae.device, vae.dtype).unsqueeze(2)

        def per_channel(values: Sequence[float]) -> Tensor:
            return torch.tensor(values).view(1, vae.config.z_dim, 1, 1, 1)

        # The pipeline divides by the reciprocal; multiplying by the std itself differs in the last bit.
        mean = per_channel(vae.config.latents_mean).to(latents.device, latents.dtype)
        reciprocal = 1.0 / per_channel(vae.config.latents_std).to(latents.device, latents.dtype)
        pixels = vae.decode(latents / reciprocal + mean, return_dict=False)[0][:, :, 0]
        pictures: list[Image] = pipe.image_processor.postprocess(pixels)
        return pictures

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Guidance whose tokens keep the norm of the conditional prediction."""
        height, width = conditional.shape[-2:]
        conditional, unconditional = pack(conditional), pack(unconditional)
        combined = unconditional + scale * (conditional - unconditional)
        norm = torch.norm(conditional, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True)
        return unpack(combined * norm, height, width)

    def tiny(self, folder: Path) -> None:
        """3 blocks, a Qwen2.5-VL that sees pictures, latents 16 x f8."""
        write_tiny(folder, self.pipeline, zero_cond_t=False)

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        options = {**asked.options, "true_cfg_scale": asked.guidance, "negative_prompt": self.negative_prompt}
        if not asked.references:
            pipe = text_to_image(pipe)
            pipe.set_progress_bar_config(disable=True)
        else:
            (options["image"],) = asked.references  # in a list the pipeline would leave it at its own size
        with replaced(edit, "calculate_dimensions", lambda _, ratio: calculate_dimensions(asked.area, ratio)):
            drawn: Image = pipe(**options).images[0]
        return drawn


def sliver_fault(picture: Extent, seen: Extent) -> str | None:
    """Why Qwen2.5-VL cannot be shown a picture, or None.

    Args:
        picture: its own (width, height).
        seen: that at which the language model would see it.
    """
    width, height = seen
    if min(width, height) > 0 and max(width, height) <= LONGEST_RATIO * min(width, height):
        return None
    return (
        f"{picture[0]} x {picture[1]} pixels are too long and narrow: the language model takes sides of which one "
        f"is at most {LONGEST_RATIO} times the other, and would see {width} x {height}; crop it"
    )


def text_to_image(pipe: DiffusionPipeline) -> QwenImagePipeline:
    """The text-to-image pipeline over the same components; no weight is copied."""
    parts = {name: pipe.components[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
    return QwenImagePipeline(**parts)


def write_tiny(folder: Path, cls: type[DiffusionPipeline], zero_cond_t: bool) -> None:
    """A tiny checkpoint of a pipeline with these components.

    Args:
        zero_cond_t: modulate reference tokens at t = 0, as the 2511 checkpoint does.
    """
    from qwen_image_finetune.families import tiny

    identity = {"pipeline": cls.__name__, "zero_cond_t": zero_cond_t}
    tiny.write_once(folder, identity, lambda: tiny_pipeline(cls, zero_cond_t))


def tiny_pipeline(cls: type[DiffusionPipeline], zero_cond_t: bool) -> DiffusionPipeline:
    """The pipeline that `write_tiny` writes."""
    from qwen_image_finetune.families import tiny

    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=3,
        attention_head_dim=tiny.HEAD_DIM,
        num_attention_heads=tiny.HEADS,
        joint_attention_dim=tiny.WIDTH,
        axes_dims_rope=tiny.ROPE,
        zero_cond_t=zero_cond_t,
    )
    text = tiny.qwen_text()
    if cls is QwenImagePipeline:  # which looks at no picture
        del text["processor"]
    return cls(
        scheduler=tiny_scheduler(),
        vae=tiny.film_vae(AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)),
        **text,
        transformer=tiny.sharpen(tiny.randomise(transformer, seed=3)),
    )


def tiny_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
