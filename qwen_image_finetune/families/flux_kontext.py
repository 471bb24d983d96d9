"""FLUX.1 Kontext: double- and single-stream transformer, CLIP + T5 text, guidance embedding.

Oracle: `diffusers.FluxKontextPipeline`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    ModelMixin,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL.Image import Image, Resampling
from torch import Tensor

from qwen_image_finetune.families.base import (
    Asked,
    Family,
    Published,
    Reference,
    References,
    Room,
    quiet,
)
from qwen_image_finetune.families.packing import concatenate_tokens, unpack
from qwen_image_finetune.lora.names import Native
from qwen_image_finetune.lora.readers import CONVERTED, EVERYTHING, OUTSIDE_BLOCKS, Reader
from qwen_image_finetune.records import Batch, Extent

MAX_PROMPT_TOKENS = 512


def authors_names() -> dict[str, Native]:
    """Names of FLUX.1 modules in its authors' code; {} stands for the number of a block."""
    single = "single_transformer_blocks.{}"
    names = {
        "img_in": Native(("x_embedder",)),
        "txt_in": Native(("context_embedder",)),
        "final_layer.linear": Native(("proj_out",)),
        "final_layer.adaLN_modulation.1": Native(("norm_out.linear",), halves_swapped=True),
        "single_blocks.{}.linear1": Native(
            (*(f"{single}.attn.to_{letter}" for letter in "qkv"), f"{single}.proj_mlp"), rows=(1, 1, 1, 4)
        ),
        "single_blocks.{}.linear2": Native((f"{single}.proj_out",)),
        "single_blocks.{}.modulation.lin": Native((f"{single}.norm.linear",)),
    }
    for embedder, native in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for number, layer in ((1, "in_layer"), (2, "out_layer")):
            names[f"{native}_in.{layer}"] = Native((f"time_text_embed.{embedder}_embedder.linear_{number}",))
    for stream, norm in (("img", "norm1"), ("txt", "norm1_context")):
        names[f"double_blocks.{{}}.{stream}_mod.lin"] = Native((f"transformer_blocks.{{}}.{norm}.linear",))
    return names | block_names("net.0.proj", "net.2")


def block_names(first: str, last: str) -> dict[str, Native]:
    """Names that FLUX.1 and FLUX.2 share: attention and feed-forward of double blocks, the norms of single ones.

    Args:
        first, last: what diffusers calls the layers of a feed-forward.
    """
    names: dict[str, Native] = {}
    norms = (("query", "q"), ("key", "k"))
    for stream, qkv, out, feed_forward, added in (
        ("img", "to_{}", "to_out.0", "ff", ""),
        ("txt", "add_{}_proj", "to_add_out", "ff_context", "added_"),
    ):
        block, double = f"double_blocks.{{}}.{stream}", "transformer_blocks.{}"
        parts = tuple(f"{double}.attn.{qkv.format(letter)}" for letter in "qkv")
        names[f"{block}_attn.qkv"] = Native(parts, rows=(1, 1, 1))
        names[f"{block}_attn.proj"] = Native((f"{double}.attn.{out}",))
        names[f"{block}_mlp.0"] = Native((f"{double}.{feed_forward}.{first}",))
        names[f"{block}_mlp.2"] = Native((f"{double}.{feed_forward}.{last}",))
        for long, short in norms:
            names[f"{block}_attn.norm.{long}_norm"] = Native((f"{double}.attn.norm_{added}{short}",), weight="scale")
    for long, short in norms:
        module = f"single_transformer_blocks.{{}}.attn.norm_{short}"
        names[f"single_blocks.{{}}.norm.{long}_norm"] = Native((module,), weight="scale")
    return names


# diffusers reads no authors' names with lora_A and lora_B; kohya's tools train and read the blocks, sd-scripts the
# embedders too.
READERS = (
    *(Reader("ComfyUI", dialect) for dialect in ("diffusers", "comfy", "kohya")),
    Reader("diffusers", "diffusers"),
    Reader("diffusers", "comfy", EVERYTHING),
    Reader("diffusers", "kohya", OUTSIDE_BLOCKS),
    Reader("sd-scripts", "diffusers", OUTSIDE_BLOCKS, ", after its networks/convert_flux_lora.py"),
    Reader("sd-scripts", "comfy", EVERYTHING),
    Reader("sd-scripts", "kohya", r"final_layer\..*"),
    Reader("musubi-tuner", "diffusers", EVERYTHING),
    Reader("musubi-tuner", "comfy", OUTSIDE_BLOCKS, CONVERTED),
    Reader("musubi-tuner", "kohya", OUTSIDE_BLOCKS),
)


class FluxKontext(Family):
    """FLUX.1 Kontext [dev]."""

    name = "FluxKontext"
    pipeline = FluxKontextPipeline
    transformer = FluxTransformer2DModel
    text_components: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    prompt_tokenizer = "tokenizer_2"
    text_sees_references = False
    max_references = 8
    side_multiple = 16
    num_inference_steps = 28
    guidance_scale = 3.5
    lora_names = authors_names()
    lora_readers = READERS
    vae_pixel_bytes = 1280
    published: ClassVar[tuple[Published, ...]] = (
        Published(
            "black-forest-labs/FLUX.1-Kontext-dev",
            4.97e9,
            "FLUX.1 [dev] non-commercial",
            {"guidance_embeds": True},
            3.71e9,
        ),
    )

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """The nearest of the 17 preferred resolutions; at another area, the aspect ratio in multiples of 16."""
        ratio = width / height
        if area is None:
            _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        else:
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        multiple = self.side_multiple
        return max(width // multiple, 1) * multiple, max(height // multiple, 1) * multiple

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """(16, H/8, W/8): (mode - shift_factor) * scaling_factor."""
        pixels = self.pixels(pipe, image).to(pipe.vae.device, pipe.vae.dtype)
        latent: Tensor = pipe.vae.encode(pixels).latent_dist.mode()[0]
        return (latent - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """T5 states (512, D), padding included and not masked, as the model was trained; pooled CLIP state (P,).

        A checkpoint whose T5 tokenizer says that its prompts are shorter gets what it says.
        """
        with quiet(self.pipeline.__module__, "transformers.tokenization_utils_base"):
            embeds, pooled, _ = pipe.encode_prompt(
                prompt, device=pipe.text_encoder_2.device, max_sequence_length=prompt_length(pipe)
            )
        return {"prompt_embeds": embeds[0], "pooled_prompt_embeds": pooled[0]}

    def room(self, pipe: DiffusionPipeline, target: Extent, references: References) -> Room:
        """What T5 reads, less its closing token. CLIP's summary, of 77 tokens, is of the beginning at any length."""
        return Room(prompt_length(pipe) - 1, cut=True)

    def text_tokens(self, references: Sequence[Extent]) -> int:
        return MAX_PROMPT_TOKENS

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        text = batch.text["prompt_embeds"]
        ids = [image_ids(0, noisy), *(image_ids(i, reference) for i, reference in enumerate(batch.references, start=1))]
        predicted: Tensor = transformer(
            hidden_states=concatenate_tokens(noisy, batch.references),
            timestep=timestep,
            guidance=None if guidance is None else torch.full_like(timestep, guidance, dtype=torch.float32),
            pooled_projections=batch.text["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        return unpack(predicted[:, : self.tokens(noisy.shape)], height, width)

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        latents = latents.to(pipe.vae.device, pipe.vae.dtype)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pictures: list[Image] = pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0])
        return pictures

    def text_shape(self, name: str, tokens: int, transformer_config: Mapping[str, Any]) -> tuple[int, ...]:
        if name == "pooled_prompt_embeds":
            return (transformer_config["pooled_projection_dim"],)
        return super().text_shape(name, tokens, transformer_config)

    def tiny(self, folder: Path) -> None:
        """2 double and 2 single blocks, latents 16 x f8, guidance embedding."""
        from qwen_image_finetune.families import tiny

        tiny.write_once(folder, {"pipeline": self.pipeline.__name__}, lambda: tiny_pipeline(self.pipeline))

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        seen = [one.resize(self.size(*one.size, asked.area), Resampling.LANCZOS) for one in asked.references]
        picture: Image = pipe(
            image=seen or None,
            **asked.options,
            max_area=asked.size[0] * asked.size[1],
            _auto_resize=False,
            guidance_scale=asked.guidance,
            max_sequence_length=pipe.tokenizer_2.model_max_length,  # of the full-size checkpoint: the default, 512
        ).images[0]
        return picture


def prompt_length(pipe: DiffusionPipeline) -> int:
    """Tokens of T5, padding and closing token included."""
    return min(MAX_PROMPT_TOKENS, int(pipe.tokenizer_2.model_max_length))


def image_ids(index: int, latent: Tensor) -> Tensor:
    """Position ids (tokens, 3) of one picture: (index, row, column). The target is 0, references count from 1.

    The pipeline knows one reference, with index 1; further ones continue its count, so that ids never overlap.
    """
    height, width = latent.shape[-2] // 2, latent.shape[-1] // 2
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, height, width, latent.device, latent.dtype)
    ids[..., 0] = index
    return ids


def tiny_pipeline(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    """The pipeline that `FluxKontext.tiny` writes, of a class with these components."""
    from qwen_image_finetune.families import tiny

    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=tiny.HEAD_DIM,
        num_attention_heads=tiny.HEADS,
        joint_attention_dim=tiny.WIDTH,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=tiny.ROPE,
    )
    return cls(
        scheduler=tiny_scheduler(),
        vae=tiny_vae(),
        **tiny.flux_text(),
        transformer=tiny.sharpen(tiny.randomise(transformer, seed=4)),
    )


def tiny_vae() -> AutoencoderKL:
    """FLUX.1's autoencoder with few channels."""
    from qwen_image_finetune.families import tiny

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=1024,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    tiny.amplify(tiny.randomise(vae, seed=1).encoder.conv_out, rows=vae.config.latent_channels, factor=5.0)
    return vae


def tiny_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1's scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
