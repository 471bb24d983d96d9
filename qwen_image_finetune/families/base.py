"""The one interface between the trainer and a model family."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from PIL.Image import Image, Resampling
from torch import Tensor

from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.lora.names import USUAL_TARGETS, Names, Naming, Native
from qwen_image_finetune.lora.readers import USUAL_READERS, Reader
from qwen_image_finetune.records import Batch, Extent

# Of each its own size, and that at which the VAE sees it.
References = Sequence[tuple[Extent, Extent]]


class Reference(NamedTuple):
    """A picture that a prompt speaks about."""

    picture: Image  # at its own size
    size: Extent  # (width, height) at which the VAE sees it


class Defaults(NamedTuple):
    """How a checkpoint draws unless told otherwise."""

    num_inference_steps: int
    guidance_scale: float


class Room(NamedTuple):
    """How long a prompt may be."""

    tokens: int
    cut: bool  # a longer one is read up to there; else it cannot be read at all


@dataclass(frozen=True)
class Asked:
    """A picture that diffusers' own pipeline is asked for."""

    prompt: str
    references: Sequence[Image]
    size: Extent  # (width, height)
    steps: int
    guidance: float  # as `guidance_scale` of our prediction
    area: int  # of the references, in place of the pipeline's own, which may be written into its code
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that all pipelines name alike; the generator is a new one."""
        return {
            "prompt": self.prompt, "width": self.size[0], "height": self.size[1], "num_inference_steps": self.steps,
            "generator": torch.Generator().manual_seed(self.seed),
        }  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A checkpoint on the hub, as the planner takes it where it is not on this machine."""

    name: str  # owner/name
    encoder_parameters: float  # of text encoders and VAE together
    licence: str
    transformer: Mapping[str, Any] = field(default_factory=dict)  # configuration, where it is not the class's default
    encoder_quantisable: float = 0.0  # of encoder_parameters, those that model.quantize_text_encoders narrows


class Family(ABC):
    """One model family. Holds no weights, so caching, training and prediction share it."""

    name: ClassVar[str]  # value of train.trainer
    pipeline: ClassVar[type[DiffusionPipeline]]
    transformer: ClassVar[type[ModelMixin]]
    text_components: ClassVar[tuple[str, ...]]  # parts of the pipeline that decide the text embeddings
    always_loaded: ClassVar[tuple[str, ...]] = ()  # those that its constructor asks something, and that are small
    text_embeddings: ClassVar[tuple[str, ...]]  # names in the result of `encode_text`
    prompt_tokenizer: ClassVar[str] = "tokenizer"  # the one whose tokens are counted where prompts have a limit
    text_sees_references: ClassVar[bool]  # the text encoder looks at the references too
    max_references: ClassVar[int]
    edit_family: ClassVar[str] = ""  # where it takes none: the family of its authors' model that does
    sizing_reference: ClassVar[int] = 0  # which of several references gives the picture its size
    references_follow: ClassVar[bool] = False  # the pipeline brings them to the size of what is drawn
    side_multiple: ClassVar[int]  # sides of target and references are multiples of this, in pixels
    token_side: ClassVar[int] = 2  # latents of a side of one token of the transformer
    num_inference_steps: ClassVar[int]  # of prediction, with a checkpoint that is not distilled
    guidance_scale: ClassVar[float]
    resampling: ClassVar[Resampling] = Resampling.LANCZOS  # with which the pipeline resizes pictures
    scheduler_levels: ClassVar[bool] = False  # the pipeline leaves noise levels to the scheduler, and tells float32
    rounds_levels: ClassVar[bool] = False  # it rounds noise levels, not timesteps, to the precision of the latents
    noise_in_float32: ClassVar[bool] = False  # it draws noise in float32, not in the precision of the latents
    guides_in_one_pass: ClassVar[bool] = False  # classifier-free guidance is one batch: negative prompts, then prompts
    negative_prompt: ClassVar[str] = " "  # the pipelines' own word for "no prompt" in classifier-free guidance
    references_apart: ClassVar[bool] = False  # some weights are reached by references alone
    adapter_targets: ClassVar[tuple[str, ...] | str] = USUAL_TARGETS  # of a LoRA, unless configured
    lora_names: ClassVar[Mapping[str, Native]] = {}  # modules that their authors call otherwise
    lora_readers: ClassVar[tuple[Reader, ...]] = USUAL_READERS  # programs that read its LoRA files
    # What the published VAE's encoder holds at its peak for each pixel, in 16 bits, its one attention without a matrix:
    # counted on tensors without memory.
    vae_pixel_bytes: ClassVar[int] = 1935
    published: ClassVar[tuple[Published, ...]]  # the one that most people train first

    @property
    def naming(self) -> Naming:
        """What LoRA files have to know of the model."""
        return Naming(self.pipeline, self.lora_names, self.lora_readers, self.published_transformers)

    @property
    def file_names(self) -> Names:
        """What files with the whole transformer call modules that diffusers calls otherwise."""
        return self.lora_names

    def published_transformers(self) -> Iterator[ModelMixin]:
        """The published transformers, one after the other, without memory."""
        for one in self.published:
            with init_empty_weights():
                yield self.transformer(**one.transformer)

    @abstractmethod
    def size(self, width: int, height: int, area: int | None = None, references: int = 1) -> Extent:
        """Size, in pixels, at which the pipeline sees a picture of `width` x `height`.

        Args:
            area: pixel area to scale to; None is the model's own.
            references: how many the model is shown at once, of which this may be one, or the picture that is drawn.
        """

    def scaled(self, picture: Extent, size: Extent, area: int | None = None, references: int = 1) -> Extent:
        """Size to which a picture is resized before it is brought to `size`: what stands over is cut off on both sides,
        what is missing is filled with its reflection.

        Most pipelines do neither: they resize to `size` itself.

        Args:
            picture: (width, height) as it is.
            size: at which the VAE sees it, such as `size` of the same area.
            area, references: as in `size`.
        """
        return size

    def reference_size(self, picture: Extent, target: Extent, area: int | None = None, references: int = 1) -> Extent:
        """(width, height) at which the VAE sees a reference beside a target of a size.

        Args:
            picture: (width, height) of the reference as it is.
            area, references: as in `size`.
        """
        return target if self.references_follow else self.size(*picture, area, references)

    def pixels(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """What the VAE is given of an RGB picture: (1, channels, H, W) in [-1, 1]; with a frame axis for films."""
        pixels: Tensor = pipe.image_processor.preprocess(image)
        return pixels

    @abstractmethod
    def encode_image(self, pipe: DiffusionPipeline, image: Image) -> Tensor:
        """Normalised latent (C, H, W) of an RGB picture at its final size: mode of the posterior, dtype of the VAE."""

    @abstractmethod
    def encode_text(
        self, pipe: DiffusionPipeline, prompt: str, references: Sequence[Reference] = ()
    ) -> dict[str, Tensor]:
        """Text embeddings under the family's own names, (T, D) without padding or (D,).

        Args:
            references: the pictures the prompt speaks about; ignored unless `text_sees_references`.
        """

    @abstractmethod
    def text_tokens(self, references: Sequence[Extent]) -> int:
        """About how many tokens `encode_text` gives for a prompt of a few sentences.

        Args:
            references: (width, height) at which the VAE sees each of them.
        """

    @property
    def takes_none(self) -> str:
        """Why a picture cannot be given to a family without references, and what takes one."""
        return (
            f"{self.name} draws from words alone and takes no control image; to edit pictures use {self.edit_family}, "
            f"such as {FAMILIES[self.edit_family].example}"
        )

    def reference_fault(self, picture: Extent, size: Extent) -> str | None:
        """Why a reference cannot be shown to the model, or None.

        Args:
            picture: its own (width, height).
            size: that at which the VAE sees it.
        """
        return None

    def room(self, pipe: DiffusionPipeline, target: Extent, references: References) -> Room | None:
        """How many tokens a prompt may have; None where there is no limit.

        Args:
            pipe: its tokenizers; nothing else of it need be loaded.
            target: (width, height) of what is drawn.
            references: of each, its own (width, height) and that at which the VAE sees it; see `reference_fault`.
        """
        return None

    def prompt_tokens(self, pipe: DiffusionPipeline, prompt: str) -> list[int]:
        """The tokens of a prompt as the tokenizer has them whose tokens `room` counts; nothing around them."""
        return plain_tokens(text_tokenizer(pipe.components[self.prompt_tokenizer]), prompt)

    def control_words(self, pipe: DiffusionPipeline, prompt: str) -> list[str]:
        """Parts of a prompt that a tokenizer takes for control tokens: they never reach the model as text."""
        found: dict[str, None] = {}
        for name in self.text_components:
            if not name.startswith("tokenizer"):
                continue
            tokenizer = text_tokenizer(pipe.components[name])
            control = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}  # which unknown letters are, too
            for token in plain_tokens(tokenizer, prompt):
                if token in control:
                    found.setdefault(tokenizer.added_tokens_decoder[token].content)
        return list(found)

    @abstractmethod
    def velocity(
        self, transformer: ModelMixin, noisy: Tensor, timestep: Tensor, batch: Batch, guidance: float | None = None
    ) -> Tensor:
        """Predicted velocity eps - x0, shape of `noisy`.

        Args:
            noisy: (B, C, H, W) noisy target latents.
            timestep: (B,) float32 in [0, 1], the noise level sigma.
            batch: references and text of the same rows; its target is not read.
            guidance: value of the guidance embedding; None for checkpoints that have none.
        """

    @abstractmethod
    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> list[Image]:
        """Pictures of normalised latents (B, C, H, W)."""

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline combines it, most as Ho and Salimans (2022); all (B, C, H, W)."""
        return unconditional + scale * (conditional - unconditional)

    def distilled_guidance(self, transformer_config: Mapping[str, Any]) -> bool:
        """Whether `guidance_scale` goes into the model (an embedding) instead of a second, unconditional pass."""
        return bool(transformer_config["guidance_embeds"])

    def defaults(self, pipeline_config: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> Defaults:
        """How a checkpoint draws.

        Args:
            pipeline_config: its model_index.json.
            transformer_config: config.json of its transformer.
        """
        return Defaults(self.num_inference_steps, self.guidance_scale)

    def transformer_fault(self, transformer_config: Mapping[str, Any]) -> str | None:
        """Why a transformer of this configuration cannot be trained or drawn with here; None where it can."""
        return None

    def distilled(self, pipeline_config: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        """What to say before a checkpoint is trained that was distilled to few steps; None where it was not."""
        return None

    def mu(self, tokens: int, scheduler_config: Mapping[str, Any], steps: int) -> float:
        """Log of the timestep shift for `tokens` target tokens, linear between the scheduler's own two points.

        Source: `calculate_shift` of the pipelines.

        Args:
            steps: of the sampler, which some models' shift depends on. Training takes those of `num_inference_steps`:
                the levels that are learnt are those at which pictures will be drawn.
        """
        base_tokens = scheduler_config.get("base_image_seq_len", 256)
        max_tokens = scheduler_config.get("max_image_seq_len", 4096)
        base_shift, max_shift = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
        slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        return float(tokens * slope + (base_shift - slope * base_tokens))

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Number of transformer tokens of a latent (..., H, W)."""
        return (latent_shape[-2] // self.token_side) * (latent_shape[-1] // self.token_side)

    def latent_shape(
        self, width: int, height: int, transformer_config: Mapping[str, Any], vae_scale_factor: int | None = None
    ) -> tuple[int, int, int]:
        """(C, H, W) of what `encode_image` gives for a picture of `width` x `height`.

        Args:
            vae_scale_factor: pixels of a side of one latent; None is the published VAE's.
        """
        pixels = vae_scale_factor or self.side_multiple // 2  # tokens are 2 x 2 latents
        return transformer_config["in_channels"] // 4, height // pixels, width // pixels

    def text_shape(self, name: str, tokens: int, transformer_config: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of the text embedding called `name`, one of `text_embeddings`, for a prompt of so many tokens."""
        return tokens, transformer_config["joint_attention_dim"]

    def stand_in_text(
        self, tokens: int, references: Sequence[tuple[int, ...]], transformer_config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """What `encode_text` gives for a prompt of so many tokens, without meaning.

        Args:
            references: shapes (C, H, W) of their latents.
        """
        return {name: torch.zeros(self.text_shape(name, tokens, transformer_config)) for name in self.text_embeddings}

    @abstractmethod
    def tiny(self, folder: Path) -> None:
        """Write a tiny random checkpoint of the real architecture, in diffusers layout, for tests and the demo."""

    @abstractmethod
    def oracle(self, pipe: DiffusionPipeline, asked: Asked) -> Image:
        """The same picture from diffusers' own pipeline, called as its users call it: what tests compare with."""


def covering(picture: Extent, size: Extent) -> Extent:
    """The least (width, height) of the aspect ratio of `picture` in which `size` fits.

    Source: `_resize_and_crop` of diffusers' `VaeImageProcessor`.
    """
    (own_width, own_height), (width, height) = picture, size
    if width * own_height > height * own_width:
        return width, own_height * width // own_width
    return own_width * height // own_height, height


def text_tokenizer(component: Any) -> Any:
    """The tokenizer of a pipeline, which some keep inside a processor of texts and pictures."""
    return getattr(component, "tokenizer", component)


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone, however many."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return tokens


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Nothing below an error from these loggers for a while: what they say was said before, with a file's name."""
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(found, before, strict=True):
            logger.setLevel(level)


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """A name of a module or object, such as a size that a pipeline has in its code, with another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
