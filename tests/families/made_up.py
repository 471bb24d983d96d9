"""A family that nobody published, unlike the others in all that a family may decide, and its pipeline.

It is here to prove that a family is one file and one line: `register` is the line. Latents are not packed, references
stand before the target and are cut to size, two text streams are padded and masked apart, the shift follows the number
of steps, and its authors would have fused what diffusers keeps apart.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    QwenImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import QwenImageLoraLoaderMixin
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad

from qwen_image_finetune.config.registry import FAMILIES, Entry
from qwen_image_finetune.families import tiny
from qwen_image_finetune.families.base import Asked, Family, Published, Reference, covering
from qwen_image_finetune.lora.names import Native
from qwen_image_finetune.records import Batch

STREAMS = ("words", "names")  # states of T5, and of CLIP, which are half as wide


def register() -> None:
    """The line in the registry; a family of the package needs no entry in `sys.modules`."""
    sys.modules["qwen_image_finetune.families.made_up"] = sys.modules[__name__]
    FAMILIES["MadeUp"] = Entry("made_up", "MadeUp", "MadeUpPipeline", "nobody/made-up")


def states(pipe: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
    """Both streams, (T, 64) and (T, 32), without padding."""
    found = {}
    for name, part in zip(STREAMS, ("_2", ""), strict=True):
        encoder = getattr(pipe, f"text_encoder{part}")
        ids = getattr(pipe, f"tokenizer{part}")(prompt, return_tensors="pt", truncation=True).input_ids
        found[name] = encoder(ids.to(encoder.device)).last_hidden_state[0]
    return found


class MadeUpPipeline(DiffusionPipeline, QwenImageLoraLoaderMixin):  # type: ignore[misc]
    """How its authors draw: one picture at a time, nothing padded."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: QwenImageTransformer2DModel,
    ) -> None:
        super().__init__()
        self.register_modules(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
            text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, transformer=transformer,
        )  # fmt: skip
        self.vae_scale_factor = 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=8)

    @torch.no_grad()
    def __call__(
        self, prompt: str, images: Sequence[Image], sizes: Sequence[tuple[int, int]], size: tuple[int, int],
        steps: int, guidance: float, generator: torch.Generator,
    ) -> Image:  # fmt: skip
        """A picture of `size`, with references seen at `sizes`."""
        dtype, scale = self.vae.dtype, self.vae.config.scaling_factor
        seen = [
            self.vae.encode(
                self.image_processor.preprocess(image, height=h, width=w, resize_mode="crop").to(dtype)
            ).latent_dist.mode() * scale
            for image, (w, h) in zip(images, sizes, strict=True)
        ]  # fmt: skip
        latents = torch.randn((1, 16, size[1] // 8, size[0] // 8), generator=generator, dtype=dtype)
        shapes = [(1, *picture.shape[2:]) for picture in (*seen, latents)]
        tokens = latents.shape[2] * latents.shape[3]
        mu = 0.5 + tokens / 4096 + steps / 100
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        texts = [states(self, text) for text in (prompt, "")]
        for time in self.scheduler.timesteps:
            found = [
                self.transformer(
                    hidden_states=torch.cat([p.flatten(2).transpose(1, 2) for p in (*seen, latents)], dim=1),
                    timestep=time.expand(1).to(dtype) / 1000,
                    encoder_hidden_states=torch.cat([text["words"], pad(text["names"], (0, 32))])[None],
                    encoder_hidden_states_mask=None, img_shapes=[shapes], return_dict=False,
                )[0][:, -tokens:].transpose(1, 2).unflatten(2, latents.shape[2:])
                for text in texts
            ]  # fmt: skip
            predicted = found[1] + guidance * (found[0] - found[1])
            latents = self.scheduler.step(predicted, time, latents, return_dict=False)[0]
        picture: Image = self.image_processor.postprocess(self.vae.decode(latents / scale, return_dict=False)[0])[0]
        return picture


class MadeUp(Family):
    """The family, for which nothing outside of this file was written."""

    name = "MadeUp"
    pipeline = MadeUpPipeline
    transformer = QwenImageTransformer2DModel
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_embeddings = STREAMS
    text_sees_references = False
    max_references = 3
    side_multiple = 8
    token_side = 1
    num_inference_steps = 6
    guidance_scale = 3.0
    negative_prompt = ""
    adapter_targets = tuple(f"attn.{name}" for x in "qkv" for name in (f"to_{x}", f"add_{x}_proj"))
    lora_names: ClassVar[Mapping[str, Native]] = {
        "blocks.{}.seen.qkv": Native(tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"), (1, 1, 1)),
        "blocks.{}.read.qkv": Native(tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)),
    }
    published = (Published("nobody/made-up", 1e6, "none", {"num_layers": 4, "joint_attention_dim": 64}),)

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> tuple[int, int]:
        scale = ((area or 128 * 128) / (width * height)) ** 0.5
        return max(int(width * scale) // 8 * 8, 8), max(int(height * scale) // 8 * 8, 8)

    def scaled(
        self, picture: tuple[int, int], size: tuple[int, int], area: int | None = None, references: int = 1
    ) -> tuple[int, int]:
        return covering(picture, size)

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        pixels = pipe.image_processor.preprocess(image).to(pipe.vae.device, pipe.vae.dtype)
        latent: Tensor = pipe.vae.encode(pixels).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
        return latent

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        return states(pipe, prompt)

    def text_tokens(self, references: Sequence[tuple[int, int]]) -> int:
        return 20

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        words, names = (batch.text[name] for name in STREAMS)
        masks = [
            batch.text_masks.get(name, torch.ones(batch.text[name].shape[:2], dtype=torch.int64, device=noisy.device))
            for name in STREAMS
        ]
        text, mask = (
            torch.cat([words, pad(names, (0, words.shape[2] - names.shape[2]))], dim=1),
            torch.cat(masks, dim=1),
        )
        # Positions are counted along the sequence, so padding between the streams has to go to its end.
        order = mask.argsort(dim=1, descending=True, stable=True)
        text, mask = text.gather(1, order[..., None].expand_as(text)), mask.gather(1, order)
        pictures = (*batch.references, noisy)
        predicted: Tensor = transformer(
            hidden_states=torch.cat([p.to(noisy.dtype).flatten(2).transpose(1, 2) for p in pictures], dim=1),
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask if batch.text_masks else None,
            img_shapes=[[(1, *picture.shape[2:]) for picture in pictures]] * len(noisy),
            return_dict=False,
        )[0]
        return predicted[:, -self.tokens(noisy.shape) :].transpose(1, 2).unflatten(2, noisy.shape[2:])

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        latents = latents.to(pipe.vae.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor
        pictures: list[Image] = pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0])
        return pictures

    def mu(self, tokens: int, scheduler_config: Mapping[str, Any], steps: int) -> float:
        return 0.5 + tokens / 4096 + steps / 100

    def latent_shape(
        self, width: int, height: int, transformer_config: Mapping[str, Any], vae_scale_factor: int | None = None
    ) -> tuple[int, int, int]:
        return transformer_config["in_channels"], height // 8, width // 8

    def text_shape(self, name: str, tokens: int, transformer_config: Mapping[str, Any]) -> tuple[int, ...]:
        return tokens, transformer_config["joint_attention_dim"] // (2 if name == "names" else 1)

    def tiny(self, folder: Path) -> None:
        tiny.write_once(folder, {"pipeline": "MadeUpPipeline"}, tiny_pipeline)

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        sizes = [self.size(*reference.size, asked.area) for reference in asked.references]
        picture: Image = pipe(
            asked.prompt, asked.references, sizes, asked.size, asked.steps, asked.guidance, asked.options["generator"]
        )
        return picture


def tiny_pipeline() -> MadeUpPipeline:
    """The pipeline that `MadeUp.tiny` writes."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32), layers_per_block=1, latent_channels=16, norm_num_groups=8,
    )  # fmt: skip
    tiny.amplify(tiny.randomise(vae, seed=1).encoder.conv_out, rows=16, factor=5.0)
    transformer = QwenImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=tiny.HEAD_DIM,
        num_attention_heads=tiny.HEADS, joint_attention_dim=tiny.WIDTH, axes_dims_rope=tiny.ROPE,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    transformer = tiny.sharpen(tiny.randomise(transformer, seed=4))
    return MadeUpPipeline(scheduler=scheduler, vae=vae, **tiny.flux_text(), transformer=transformer)


register()
