"""FLUX 3 Image [klein]: streams for text, picture and references, then single blocks; eight inner states of Qwen3-VL.

Oracle: the modular blocks of diffusers (`Flux3AutoBlocks`), without the model that rewrites prompts. Text and
references are modulated at timestep 0. A prompt is padded to a multiple of 80 tokens, and the transformer attends to
the padding: how long a row's text is belongs to its conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    Flux3Transformer2DModel,
    ModelMixin,
)
from diffusers.modular_pipelines.flux3.decoders import Flux3DecodeStep
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep, Flux3VaeEncoderStep
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune.families.base import (
    Asked,
    Family,
    Published,
    Reference,
    References,
    Room,
    covering,
    plain_tokens,
    replaced,
)
from qwen_image_finetune.families.flux2_klein import before_cut, cut, normalisation, tiny_vae, whole
from qwen_image_finetune.families.modular import OneFolder
from qwen_image_finetune.families.packing import one_by_one
from qwen_image_finetune.lora.names import USUAL_TARGETS, Native
from qwen_image_finetune.lora.readers import EVERYTHING, Reader
from qwen_image_finetune.records import Batch, Extent

SIDE = 16  # pixels of a side of one token
LARGEST_CANVAS = 4 * 1024 * 1024  # of a reference that is shown alone
SMALLEST_SIDE, LONGEST_SIDE = 64, 4096  # of its canvas
ROPE_SCALE = 0.5  # of rows and columns among the position ids
LONGEST_PROMPT = 8192  # tokens, the words of the chat among them
BASE = "black-forest-labs/flux-3-image-klein-base"

# Of Qwen3-VL, as far as one message without pictures needs it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_LANGUAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 33,  # the last state that is read lies before the last layer, as in the published model
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
}


def authors_names() -> dict[str, Native]:
    """Names of FLUX 3 modules in its authors' code; {} stands for the number of a block.

    Source: `convert_flux3_transformer_checkpoint_to_diffusers`.
    """
    names = {
        "txt_in": Native(("context_embedder",)),
        "time_in.in_layer": Native(("timestep_embedder.linear_1",)),
        "time_in.out_layer": Native(("timestep_embedder.linear_2",)),
        "final_layer.image.linear": Native(("proj_out",)),
        "final_layer.image.adaLN_modulation.1": Native(("norm_out.linear",), halves_swapped=True),
    }
    streams = ("image", "image_cond")
    for stream in streams:
        names[f"emb_in.{stream}"] = Native((f"x_embedders.{stream}",))
    for when in ("early", "single"):
        for stream in (*streams, "txt"):
            modulation = f"{when}_stream_modulations.{stream}"
            names[f"{modulation}.lin"] = Native((f"{modulation}.linear",))
    blocks = {f"content_mode_blocks.{stream}.{{}}": f"mode_blocks.{stream}.{{}}" for stream in streams}
    blocks |= {"txt_mode_blocks.{}": "txt_mode_blocks.{}", "single_blocks.{}": "single_transformer_blocks.{}"}
    for native, block in blocks.items():
        for letter in "qkv":
            names[f"{native}.{letter}_proj"] = Native((f"{block}.attn.to_{letter}",))
        names[f"{native}.attn_out"] = Native((f"{block}.attn.to_out.0",))
        names[f"{native}.mlp_in"] = Native((f"{block}.ff.linear_in",))
        names[f"{native}.mlp_out"] = Native((f"{block}.ff.linear_out",))
        for long, short in (("query", "q"), ("key", "k")):
            names[f"{native}.norm.{long}_norm"] = Native((f"{block}.attn.norm_{short}",), weight="scale")
    return names


class Flux3ModularPipeline(OneFolder, diffusers.Flux3ModularPipeline):
    """diffusers' pipeline of the same name, from one folder. Prompts are read as they are written."""

    left_out = ("prompt_upsampler",)


class Flux3Klein(Family):
    """FLUX 3 Image [klein] Base; up to ten references."""

    name = "Flux3Klein"
    pipeline = Flux3ModularPipeline
    transformer = Flux3Transformer2DModel
    text_components = ("text_encoder", "tokenizer")
    text_embeddings = ("prompt_embeds",)
    text_sees_references = False
    max_references = 10
    side_multiple = SIDE
    token_side = 1
    num_inference_steps = 50
    guidance_scale = 3.5
    rounds_levels = True
    noise_in_float32 = True
    negative_prompt = ""
    adapter_targets = (*USUAL_TARGETS, "ff.linear_in", "ff.linear_out")  # all six matrices of every block
    references_apart = True
    lora_names = authors_names()
    # Of diffusers, which was asked; what ComfyUI and kohya's tools make of it is not known.
    lora_readers = (Reader("diffusers", "diffusers"), Reader("diffusers", "comfy", EVERYTHING),
                    Reader("diffusers", "kohya", EVERYTHING))  # fmt: skip
    published: ClassVar[tuple[Published, ...]] = (Published(BASE, 4.52e9, "FLUX Kommunity"),)

    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """Shown alone, a reference is kept whole on a canvas of multiples of 16, of at most four megapixels.

        Of several, each is scaled down to a megapixel if it is larger, and cut to multiples of 16.
        """
        if references == 1:
            return canvas(*shrunk(width, height, area))
        return cut(*whole(width, height, area))

    def scaled(self, picture: Extent, size: Extent, area: int | None = None, references: int = 1) -> Extent:
        """The canvas of one is filled around it; of several, what stands over is cut off, as where a size was set."""
        if references == 1:
            width, height = shrunk(*picture, area)
            return (width, height) if canvas(width, height) == size else covering(picture, size)
        return before_cut(picture, size, area)

    def pixels(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """Without the pipeline's `preprocess`, which would bring it to a size of its own once more."""
        processor = pipe.image_processor
        pixels: Tensor = processor.normalize(processor.numpy_to_pt(processor.pil_to_numpy(image)))
        return pixels

    @torch.no_grad()
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """(128, H/16, W/16): 2 x 2 latents side by side, normalised by the running statistics of the VAE's norm."""
        vae = pipe.vae
        latent = vae.encode(self.pixels(pipe, image).to(vae.device, vae.dtype)).latent_dist.mode()
        mean, std = normalisation(vae, latent)
        normal: Tensor = (Flux3VaeEncoderStep._patchify_latents(latent) - mean) / std
        return normal[0]

    @torch.no_grad()
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """Eight inner states side by side (T, 8 D), padding included and not masked, as the model was trained.

        T is a multiple of 80. A checkpoint whose tokenizer says that its prompts are shorter gets what it says.
        """
        embeds = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
            pipe.text_encoder, pipe.tokenizer, prompt, pipe.text_encoder.device, self.prompt_length(pipe),
            Flux3TextEncoderStep().pad_multiple,
        )  # fmt: skip
        return {"prompt_embeds": embeds[0]}

    def prompt_length(self, pipe: DiffusionPipeline) -> int:
        """Tokens up to which prompts are read."""
        return min(LONGEST_PROMPT, pipe.tokenizer.tokenizer.model_max_length)

    def room(self, pipe: DiffusionPipeline, target: Extent, references: References) -> Room:
        """What the words of the chat leave. Its closing words come last, so they are lost where a prompt is cut."""
        chat = [{"role": "user", "content": ""}]
        text = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return Room(self.prompt_length(pipe) - len(plain_tokens(pipe.tokenizer.tokenizer, text)), cut=True)

    def text_tokens(self, references: Sequence[Extent]) -> int:
        return int(Flux3TextEncoderStep().pad_multiple)

    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        """One row after the other: texts of unequal length cannot be padded to each other."""
        return torch.cat([self._alone(transformer, *row) for row in one_by_one(noisy, timestep, batch)])

    def _alone(self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        text = batch.text["prompt_embeds"]
        shown: dict[str, Any] = {}
        if batch.references:
            places = [grid(each, -(1 + number)) for number, each in enumerate(batch.references)]
            tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in batch.references], dim=1)
            shown = {"image_cond_hidden_states": tokens, "image_cond_ids": torch.cat(places)}
        words = torch.arange(text.shape[1], dtype=torch.float32, device=noisy.device)
        predicted: Tensor = transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=timestep,
            img_ids=grid(noisy, 0),
            txt_ids=torch.nn.functional.pad(words[:, None], (3, 0)),
            return_dict=False,
            **shown,
        )[0]
        return predicted.transpose(1, 2).unflatten(2, noisy.shape[-2:])

    @torch.no_grad()
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        latents = latents.to(pipe.vae.device, pipe.vae.dtype)
        mean, std = normalisation(pipe.vae, latents)
        pixels = pipe.vae.decode(Flux3DecodeStep._unpatchify_latents(latents * std + mean), return_dict=False)[0]
        pictures: list[Image] = pipe.image_processor.postprocess(pixels)
        return pictures

    def distilled_guidance(self, transformer_config: Mapping[str, Any]) -> bool:
        return False

    def transformer_fault(self, transformer_config: Mapping[str, Any]) -> str | None:
        if not transformer_config.get("flow_map"):
            return None
        return (
            "flow_map=true: this transformer is distilled to few steps, each of which it is told the end of; train on "
            f"its base, {BASE}"
        )

    def latent_shape(
        self, width: int, height: int, transformer_config: Mapping[str, Any], vae_scale_factor: int | None = None
    ) -> tuple[int, int, int]:
        """2 x 2 of the VAE's latents are one of ours, as they are one token."""
        pixels = 2 * (vae_scale_factor or SIDE // 2)
        return transformer_config["in_channels"], height // pixels, width // pixels

    def tiny(self, folder: Path) -> None:
        """A block of each stream and two single ones, latents 128 x f16, a Qwen3-VL of 33 layers."""
        from qwen_image_finetune.families import tiny

        tiny.write_once(folder, {"pipeline": self.pipeline.__name__}, tiny_pipeline)

    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        processor = pipe.image_processor
        shrink = partial(processor._resize_if_canvas_exceeds_area, target_area=asked.area)
        pictures = list(asked.references)
        if len(pictures) == 1:  # which the pipeline never enlarges
            own = shrunk(*pictures[0].size, asked.area)
            pictures = [picture.resize(own, processor.config.resample) if own > picture.size else picture
                        for picture in pictures]  # fmt: skip
        elif pictures:  # which it scales from a megapixel on
            pictures = [processor._resize_to_target_area(picture, asked.area) for picture in pictures]
        guider = pipe.get_component_spec("guider").create(guidance_scale=asked.guidance)
        pipe.update_components(guider=guider)
        with replaced(processor, "_resize_if_canvas_exceeds_area", shrink):
            drawn: Image = pipe(
                **({"image": pictures} if pictures else {}),
                **asked.options,
                output="images",
                max_sequence_length=self.prompt_length(pipe),
            )[0]
        return drawn


def canvas(width: int, height: int) -> Extent:
    """The (width, height) that a whole picture is filled up to.

    Source: `_get_canvas_height_width` of diffusers' `Flux3ImageProcessor`.
    """
    width, height = (min(LONGEST_SIDE, max(SMALLEST_SIDE, -(-side // SIDE) * SIDE)) for side in (width, height))
    return width, height


def shrunk(width: int, height: int, area: int | None) -> Extent:
    """(width, height) at which a whole picture lies on its canvas; with an `area`, also enlarged to it.

    Source: `_resize_if_canvas_exceeds_area` of diffusers' `Flux3ImageProcessor`.
    """
    most = LARGEST_CANVAS if area is None else max(area, SIDE**2)
    scale = min(math.sqrt(most / (width * height)), LONGEST_SIDE / max(width, height))
    if area is None:
        scale = min(1.0, scale)
    while True:
        own = max(1, round(width * scale)), max(1, round(height * scale))
        if math.prod(-(-side // SIDE) * SIDE for side in own) <= most:  # the least side adds to small canvases alone
            return own
        scale *= 0.995


def grid(latents: Tensor, place: int) -> Tensor:
    """Position ids (H W, 4) float32 of the tokens of latents (..., H, W): time, row, column, which picture."""
    axes = (torch.arange(number, dtype=torch.float32, device=latents.device) for number in latents.shape[-2:])
    row, column = (axis * ROPE_SCALE for axis in axes)
    return torch.cartesian_prod(row.new_zeros(1), row, column, row.new_full((1,), place))


def tiny_pipeline() -> Flux3ModularPipeline:
    """The pipeline that `Flux3Klein.tiny` writes; its scheduler is that of the blocks, as in the published one."""
    from qwen_image_finetune.families import tiny

    text = tiny.qwen3_text(chat_template=CHAT_TEMPLATE, **TINY_LANGUAGE)
    processor = text["processor"]
    processor.tokenizer.model_max_length = 2 * Flux3TextEncoderStep().pad_multiple
    transformer = Flux3Transformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=tiny.HEAD_DIM,
        num_attention_heads=tiny.HEADS,
        joint_attention_dim=8 * TINY_LANGUAGE["hidden_size"],
        axes_dims_rope=(8, 8, 8, 8),
    )
    pipe: Flux3ModularPipeline = Flux3ModularPipeline.empty()
    pipe.register_components(
        vae=tiny_vae(),
        text_encoder=text["text_encoder"],
        tokenizer=processor,
        transformer=tiny.sharpen(tiny.randomise(transformer, seed=3)),
    )
    return pipe
