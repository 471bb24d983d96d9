"""FLUX.2 [klein]: double- and single-stream transformer; three inner states of Qwen3, side by side, are the text.

Oracle: `diffusers.Flux2KleinPipeline`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ModelMixin,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL.Image import Image
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen_image_finetune.families.base import (
    Asked,
    Defaults,
    Family,
    Published,
    Reference,
    References,
    Room,
    covering,
    plain_tokens,
)
from qwen_image_finetune.families.flux_kontext import block_names, tiny_scheduler
from qwen_image_finetune.lora.names import Native
from qwen_image_finetune.lora.readers import EVERYTHING, Reader
from qwen_image_finetune.records import Batch, Extent

MODEL_AREA = 1024 * 1024
MAX_PROMPT_TOKENS = 512
APART = 10  # between the first coordinates of target, first reference, second reference, ...

# The usual four are in the double blocks alone, and those are 5 of the 25 blocks of klein 4B, 8 of the 56 of dev: a
# single block has one matrix for query, key, value and feed-forward, and another behind them. "attn.to_out" alone would
# mean a list of layers in the double blocks as well.
TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)

# Of Qwen3, without thinking.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
TINY_LANGUAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def authors_names() -> dict[str, Native]:
    """Names of FLUX.2 modules in its authors' code; {} stands for the number of a block."""
    single = "single_transformer_blocks.{}"
    names = {
        "img_in": Native(("x_embedder",)),
        "txt_in": Native(("context_embedder",)),
        "final_layer.linear": Native(("proj_out",)),
        "final_layer.adaLN_modulation.1": Native(("norm_out.linear",), halves_swapped=True),
        "single_blocks.{}.linear1": Native((f"{single}.attn.to_qkv_mlp_proj",)),
        "single_blocks.{}.linear2": Native((f"{single}.attn.to_out",)),
    }
    for modulation in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        names[f"{modulation}.lin"] = Native((f"{modulation}.linear",))
    for embedder, native in (("timestep", "time"), ("guidance", "guidance")):
        for number, layer in ((1, "in_layer"), (2, "out_layer")):
            names[f"{native}_in.{layer}"] = Native((f"time_guidance_embed.{embedder}_embedder.linear_{number}",))
    return names | block_names("linear_in", "linear_out")


# diffusers refuses an alpha beside authors' names in the comfy dialect.
READERS = (
    Reader("diffusers", "diffusers"),
    *(Reader("ComfyUI", dialect) for dialect in ("comfy", "kohya")),
    Reader("diffusers", "comfy", EVERYTHING),
    Reader("diffusers", "kohya", r".*_stream_modulation.*|final_layer\.adaLN.*|guidance_in\..*"),
)


def klein(
    name: str, encoders: tuple[float, float], licence: str, blocks: tuple[int, int], heads: int, text: int
) -> Published:
    """A published klein: `blocks` double and single ones, of as many heads of 128; text embeddings of width `text`.

    `encoders`: `encoder_parameters` and `encoder_quantisable`.

    Source: `Klein4BParams` and `Klein9BParams` of the authors' code.
    """
    double, single = blocks
    transformer = dict(
        num_layers=double, num_single_layers=single, num_attention_heads=heads, joint_attention_dim=text,
        guidance_embeds=False,
    )  # fmt: skip
    return Published(f"black-forest-labs/{name}", encoders[0], licence, transformer, encoders[1])


class Flux2Klein(Family):
    """FLUX.2 [klein], 4B and 9B, base and distilled."""

    name = "Flux2Klein"
    pipeline: ClassVar[type[DiffusionPipeline]] = Flux2KleinPipeline
    transformer = Flux2Transformer2DModel
    text_components = ("text_encoder", "tokenizer")
    text_embeddings = ("prompt_embeds",)
    text_sees_references = False
    max_references = 4  # by the authors' documentation of editing
    side_multiple = 16
    token_side = 1
    num_inference_steps = 50
    guidance_scale = 4.0
    negative_prompt = ""
    adapter_targets = TARGETS
    lora_names = authors_names()
    lora_readers = READERS
    vae_pixel_bytes = 1280
    published: ClassVar[tuple[Published, ...]] = (
        klein("FLUX.2-klein-base-4B", (4.11e9, 3.63e9), "Apache 2.0", (5, 20), 24, 7680),
        klein("FLUX.2-klein-base-9B", (8.27e9, 6.95e9), "FLUX non-commercial", (8, 24), 32, 12288),
        klein("FLUX.2-klein-4B", (4.11e9, 3.63e9), "Apache 2.0", (5, 20), 24, 7680),
        klein("FLUX.2-klein-9B", (8.27e9, 6.95e9), "FLUX non-commercial", (8, 24), 32, 12288),
    )

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """Its own size, scaled down to a megapixel if it is larger; both sides then cut to multiples of 16."""
        return cut(*whole(width, height, area))

    def scaled(self, picture: Extent, size: Extent, area: int | None = None, references: int = 1) -> Extent:
        """What stands over the multiples of 16 is cut off, and what stands over another size where one was set."""
        return before_cut(picture, size, area)

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """(128, H/16, W/16): 2 x 2 latents side by side, normalised by the running statistics of the VAE's norm."""
        pixels = pipe.image_processor.preprocess(image).to(pipe.vae.device, pipe.vae.dtype)
        latent: Tensor = pipe._encode_vae_image(pixels, generator=None)[0]
        return latent

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """Three inner states side by side (512, 3 D), padding included and not masked, as the model was trained.

        A checkpoint whose tokenizer says that its prompts are shorter gets what it says.
        """
        length = self.prompt_length(pipe)
        embeds, _ = pipe.encode_prompt(prompt, device=pipe.text_encoder.device, max_sequence_length=length)
        return {"prompt_embeds": embeds[0]}

    def prompt_length(self, pipe: DiffusionPipeline) -> int:
        """Tokens to which prompts are padded."""
        return min(MAX_PROMPT_TOKENS, pipe.tokenizer.model_max_length)

    def room(self, pipe: DiffusionPipeline, target: Extent, references: References) -> Room:
        """What the words of the chat leave. Its closing words come last, so they are lost where a prompt is cut."""
        return Room(self.prompt_length(pipe) - self.around(pipe), cut=True)

    def around(self, pipe: DiffusionPipeline) -> int:
        """Tokens of the chat with nothing in it."""
        chat = [{"role": "user", "content": ""}]
        text = pipe.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(plain_tokens(pipe.tokenizer, text))

    def text_tokens(self, references: Sequence[Extent]) -> int:
        return MAX_PROMPT_TOKENS

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        text, pictures = batch.text["prompt_embeds"], [noisy, *batch.references]
        sides = [(picture.shape[-2], picture.shape[-1]) for picture in pictures]
        ids = [grid(number * APART, *side, 1, noisy.device) for number, side in enumerate(sides)]
        words = grid(0, 1, 1, text.shape[1], noisy.device)
        predicted: Tensor = transformer(
            hidden_states=torch.cat([picture.to(noisy.dtype).flatten(2).transpose(1, 2) for picture in pictures], 1),
            timestep=timestep,
            guidance=None if guidance is None else torch.full_like(timestep, guidance, dtype=torch.float32),
            encoder_hidden_states=text,
            txt_ids=words.expand(len(noisy), -1, -1),
            img_ids=torch.cat(ids).expand(len(noisy), -1, -1),
            return_dict=False,
        )[0]
        return predicted[:, : self.tokens(noisy.shape)].transpose(1, 2).unflatten(2, noisy.shape[-2:])

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        latents = latents.to(pipe.vae.device, pipe.vae.dtype)
        mean, std = normalisation(pipe.vae, latents)
        pixels = pipe.vae.decode(pipe._unpatchify_latents(latents * std + mean), return_dict=False)[0]
        pictures: list[Image] = pipe.image_processor.postprocess(pixels)
        return pictures

    def defaults(self, pipeline_config: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> Defaults:
        """A distilled checkpoint draws in four steps."""
        return (
            Defaults(4, 1.0)
            if pipeline_config.get("is_distilled")
            else super().defaults(pipeline_config, transformer_config)
        )

    def distilled(self, pipeline_config: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        if not pipeline_config.get("is_distilled"):
            return None
        return (
            "this checkpoint is distilled to four steps, and training undoes that: pictures turn grey, and a LoRA "
            "works only at strengths of 1.5 to 2. Train on its base, FLUX.2-klein-base-4B or FLUX.2-klein-base-9B; "
            "the LoRA works on the distilled model too"
        )

    def mu(self, tokens: int, scheduler_config: Mapping[str, Any], steps: int) -> float:
        """The authors' fit to the number of tokens and of sampler steps. Of the scheduler nothing enters."""
        return float(compute_empirical_mu(tokens, steps))

    def latent_shape(
        self, width: int, height: int, transformer_config: Mapping[str, Any], vae_scale_factor: int | None = None
    ) -> tuple[int, int, int]:
        """2 x 2 of the VAE's latents are one of ours, as they are one token."""
        pixels = 2 * (vae_scale_factor or self.side_multiple // 2)
        return transformer_config["in_channels"], height // pixels, width // pixels

    def tiny(self, folder: Path) -> None:
        """2 double and 2 single blocks, latents 128 x f16, a Qwen3 of 28 layers."""
        from qwen_image_finetune.families import tiny

        tiny.write_once(
            folder,
            {"pipeline": self.pipeline.__name__},
            lambda: self.pipeline(**tiny_parts(guidance_embeds=False), **tiny_qwen3(), is_distilled=False),
        )

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        shrink = pipe.image_processor._resize_to_target_area  # which the pipeline does from a megapixel on
        picture: Image = pipe(
            image=[shrink(reference, asked.area) for reference in asked.references] or None,
            **asked.options,
            guidance_scale=asked.guidance,
            max_sequence_length=self.prompt_length(pipe),
        ).images[0]
        return picture


def whole(width: int, height: int, area: int | None) -> Extent:
    """Size of a picture before the cut: scaled to `area`; with None, down to a megapixel if it is larger.

    Source: `_resize_to_target_area` of diffusers' `Flux2ImageProcessor`.
    """
    if area is None and width * height <= MODEL_AREA:
        return width, height
    scale = math.sqrt((area or MODEL_AREA) / (width * height))
    return int(width * scale), int(height * scale)


def cut(width: int, height: int) -> Extent:
    """Size of a picture of which what stands over multiples of 16 is cut off; at least one."""
    return max(width // 16, 1) * 16, max(height // 16, 1) * 16


def before_cut(picture: Extent, size: Extent, area: int | None) -> Extent:
    """Size to which a picture is scaled before it is cut to `size`: that of `whole`, or what covers another size."""
    width, height = whole(*picture, area)
    return (width, height) if (width // 16 * 16, height // 16 * 16) == size else covering(picture, size)


def normalisation(vae: AutoencoderKLFlux2, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, C, 1, 1) of latents (B, C, H, W), 2 x 2 side by side, as the VAE's norm has seen them."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return mean.to(latents), std.to(latents)


def grid(first: int, rows: int, columns: int, words: int, device: torch.device) -> Tensor:
    """Position ids (rows * columns * words, 4): which picture, row, column, place in the text."""
    axes = [torch.arange(number, device=device) for number in (1, rows, columns, words)]
    return torch.cartesian_prod(axes[0] + first, *axes[1:])


def tiny_parts(guidance_embeds: bool) -> dict[str, Any]:
    """Scheduler, VAE and transformer of the checkpoints that `tiny` writes."""
    from qwen_image_finetune.families import tiny

    vae = tiny_vae()
    transformer = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=tiny.HEAD_DIM,
        num_attention_heads=tiny.HEADS,
        joint_attention_dim=3 * TINY_LANGUAGE["hidden_size"],
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance_embeds,
    )
    tiny.sharpen(tiny.randomise(transformer, seed=3))
    for block in transformer.transformer_blocks:  # or little of the text, most of it padding, would reach the picture
        tiny.amplify(block.attn.to_out[0], rows=transformer.inner_dim, factor=3.0)
    return {"scheduler": tiny_scheduler(), "vae": vae, "transformer": transformer}


def tiny_vae() -> AutoencoderKLFlux2:
    """The VAE of the checkpoints that `tiny` writes."""
    from qwen_image_finetune.families import tiny

    vae = AutoencoderKLFlux2(block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=8)
    tiny.amplify(tiny.randomise(vae, seed=1).encoder.conv_out, rows=vae.config.latent_channels, factor=2.5)
    generator = torch.Generator().manual_seed(5)
    vae.bn.running_mean.normal_(0, 0.3, generator=generator)
    vae.bn.running_var.uniform_(0.5, 2.0, generator=generator)
    return vae


def tiny_qwen3() -> dict[str, Any]:
    """Tokenizer and language model of the checkpoint that `Flux2Klein.tiny` writes."""
    from qwen_image_finetune.families import tiny, tiny_tokenizers

    tokenizer = tiny_tokenizers.qwen_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = tiny_tokenizers.MAX_T5_TOKENS
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=28, **TINY_LANGUAGE)
    return {"text_encoder": tiny.randomise(Qwen3ForCausalLM(config), seed=2), "tokenizer": tokenizer}
