"""Prompt and references -> pictures. Training calls the same sampler for its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL.Image import Image
from torch import Tensor

from qwen_image_finetune import flow
from qwen_image_finetune.data.images import fitted, middle, upright
from qwen_image_finetune.encoding.limits import prompt_faults, reference_faults
from qwen_image_finetune.families.base import Family, Reference, References
from qwen_image_finetune.machine import console
from qwen_image_finetune.records import Batch, Encoded, Extent, collate, joined

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin


class PredictionError(ValueError):
    """A picture that the model cannot draw as asked."""


@dataclass(frozen=True)
class Guidance:
    """How strongly prompt and references steer the sampler."""

    embedded: float | None = None  # value of the guidance embedding, for models that have one
    prompt: float = 1.0  # true classifier-free guidance; 1 needs no second pass
    image: float = 1.0  # the same for the references (InstructPix2Pix, Brooks et al. 2023, equation 3)


@dataclass(frozen=True)
class Conditions:
    """A batch as the sampler needs it: what is wanted, and the poorer conditions that guidance compares with."""

    wanted: Batch
    negative: Batch | None = None  # negative prompt, references kept
    blind: Batch | None = None  # negative prompt, no references

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditions:
        """The same on `device`, floating tensors in `dtype`."""
        poorer = [None if batch is None else batch.to(device, dtype) for batch in (self.negative, self.blind)]
        return Conditions(self.wanted.to(device, dtype), *poorer)


def guided(
    family: Family, transformer: ModelMixin, conditions: Conditions, guidance: Guidance, dtype: torch.dtype
) -> flow.Velocity:
    """Velocity under guidance; the transformer sees latents in `dtype`, the sampler goes on in the one it began with.

    With image guidance s_I and prompt guidance s_T: v = v(-, -) + s_I (v(-, I) - v(-, -)) + s_T (v(T, I) - v(-, I)).
    """

    def run(latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        predicted = family.velocity(transformer, latents.to(dtype), timestep, batch, guidance=guidance.embedded)
        return predicted.to(latents.dtype)

    both = None
    if family.guides_in_one_pass and conditions.negative is not None:
        both = joined(conditions.negative, conditions.wanted)

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        if both is not None:
            negative, predicted = run(latents.repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
        else:
            predicted = run(latents, timestep, conditions.wanted)
            if conditions.negative is None:
                return predicted
            negative = run(latents, timestep, conditions.negative)
        predicted = family.guide(predicted, negative, guidance.prompt)
        if conditions.blind is not None:
            predicted = predicted + (guidance.image - 1) * (negative - run(latents, timestep, conditions.blind))
        return predicted

    return velocity


def draw_noise(latent_shape: Sequence[int], seeds: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Initial noise (B, C, H, W), one CPU generator per picture: the pipelines' numbers for the same seeds."""
    rows = [
        randn_tensor((1, *latent_shape), generator=torch.Generator().manual_seed(seed), device=device, dtype=dtype)
        for seed in seeds
    ]
    return torch.cat(rows)


class Predictor:
    """The loaded parts of one model, ready to draw."""

    def __init__(
        self,
        family: Family,
        pipe: DiffusionPipeline,
        transformer: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        area: int | None = None,
        dtype: torch.dtype | None = None,
        turns: Sequence[str] = (),
    ) -> None:
        """
        Args:
            pipe: text encoders and VAE; its transformer is not used.
            area: pixel area of references and pictures; None is the model's own.
            dtype: of what the transformer is given; None is that of the VAE, in which noise is drawn.
            turns: components of `pipe` that wait on the host and take turns with the transformer on its device.
        """
        self.family, self.pipe, self.transformer, self.scheduler, self.area = family, pipe, transformer, scheduler, area
        self.dtype: torch.dtype = dtype or pipe.vae.dtype
        self.turns = turns
        self.defaults = family.defaults(pipe.config, transformer.config)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Around everything that asks the text encoders: those that take turns are on the device meanwhile."""
        if not self.turns:
            yield
            return
        device = self.transformer.device
        encoders = [self.pipe.components[name] for name in self.turns]
        self.transformer.to("cpu")
        try:
            for encoder in encoders:
                encoder.to(device)
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")
            self.transformer.to(device)

    def size(self, image: Image, references: int = 1) -> Extent:
        """(width, height) of a picture that takes its size from a reference, one of so many."""
        return self.family.size(*image.size, self.area, references)

    def seen(self, image: Image, size: Extent, references: int = 1) -> Extent:
        """(width, height) at which the model sees a reference of a picture of `size`, one of so many."""
        return self.family.reference_size(image.size, size, self.area, references)

    def scaled(self, image: Image, size: Extent, references: int = 1) -> Extent:
        """`Family.scaled` of a reference."""
        return self.family.scaled(image.size, size, self.area, references)

    def fitted(self, image: Image, size: Extent, references: int = 1) -> Image:
        """A reference as the VAE sees it."""
        return fitted(image, self.scaled(image, size, references), size, self.family.resampling)

    def encode(
        self, prompt: str, images: Sequence[Image], size: Extent, references: Sequence[Tensor] | None = None
    ) -> Encoded:
        """Conditions of one picture of `size`; the target latent only carries the shape of what is to be drawn.

        Args:
            references: latents of `images` at that size, each (C, H, W), where another prompt had them encoded already.
        """
        vae = self.pipe.vae
        seen = [Reference(image, self.seen(image, size, len(images))) for image in images]
        if references is None:
            references = [self.family.encode_image(self.pipe, self.fitted(*one, len(images))) for one in seen]
        shape = self.family.latent_shape(*size, self.transformer.config, getattr(self.pipe, "vae_scale_factor", None))
        return Encoded(
            key=prompt,
            target=torch.zeros(shape, dtype=vae.dtype),
            references=tuple(references),
            text=self.family.encode_text(self.pipe, prompt, seen),
        )

    @torch.no_grad()
    def predict(
        self,
        prompt_image: Image | Sequence[Image] | None,
        prompt: str,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float | None = None,
        image_guidance_scale: float = 1.0,
        width: int | None = None,
        height: int | None = None,
        seed: int | Sequence[int] = 0,
        progress: Callable[[int], None] = lambda step: None,
    ) -> list[Image]:
        """Draw pictures.

        Args:
            prompt_image: the picture to edit, several references, or None to draw from the prompt alone.
            guidance_scale: for models with a guidance embedding its value, for the others classifier-free guidance.
            negative_prompt: what classifier-free guidance steers away from.
            true_cfg_scale: classifier-free guidance on top, for models with a guidance embedding; default 1 (none).
            image_guidance_scale: guidance towards the references, for models trained with prompt_image_dropout_rate.
            width, height: of the picture; default: the size at which the model sees the reference, or that one of
                several from which the family takes it (`Family.sizing_reference`), without what was filled around it; a
                square of the model's own area where the family takes no references.
            seed: one picture is drawn for each seed.

        Raises:
            PredictionError: more references than the family can see, no reference and no size, or a size or number of
                steps that cannot be.
        """
        family = self.family
        images = (
            [] if prompt_image is None else list(prompt_image) if isinstance(prompt_image, Sequence) else [prompt_image]
        )
        images = [upright(image) for image in images]
        check_request(family, images, width, height, num_inference_steps)
        if width is None or height is None:
            size = usual_size(family, [image.size for image in images], self.area)
        else:
            size = (width, height)
        shown = [(image.size, self.seen(image, size, len(images))) for image in images]
        for words in (prompt, negative_prompt or ""):
            if read := check_prompt(family, self.pipe, words, size, shown):
                console.note(f"the prompt is longer than the model reads: {read}")
        guidance = self.guidance(guidance_scale, true_cfg_scale, image_guidance_scale)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        negative = family.negative_prompt if negative_prompt is None else negative_prompt
        conditions = self._conditions(prompt, negative, images, size, guidance, len(seeds))
        pictures = family.decode(self.pipe, self.sample(conditions, guidance, seeds, num_inference_steps, progress))
        if images and (width is None or height is None):
            own = self.scaled(images[family.sizing_reference], size, len(images))
            pictures = [middle(picture, own) for picture in pictures]
        return pictures

    def _conditions(
        self, prompt: str, negative: str, images: Sequence[Image], size: Extent, guidance: Guidance, rows: int
    ) -> Conditions:
        """What the sampler needs under this guidance, as many rows of each; nothing is encoded twice."""
        poorer = blind = None
        with self.encoding():
            wanted = self.encode(prompt, images, size)
            if guidance.prompt != 1.0 or guidance.image != 1.0:
                poorer = wanted if negative == prompt else self.encode(negative, images, size, wanted.references)
            if guidance.image != 1.0 and images:
                blind = self.encode(negative, [], size)

        def batch(row: Encoded | None) -> Batch | None:
            return None if row is None else collate([row] * rows)

        return Conditions(collate([wanted] * rows), batch(poorer), batch(blind))

    def sample(
        self,
        conditions: Conditions,
        guidance: Guidance,
        seeds: Sequence[int],
        steps: int | None = None,
        progress: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """Latents (B, C, H, W) of the wanted pictures, in the precision of the VAE."""
        device, shape = self.transformer.device, conditions.wanted.target.shape[1:]
        drawn_in = torch.float32 if self.family.noise_in_float32 else self.pipe.vae.dtype
        noise = draw_noise(shape, seeds, drawn_in, device).to(self.pipe.vae.dtype)
        velocity = guided(self.family, self.transformer, conditions.to(device, self.dtype), guidance, self.dtype)
        steps = steps or self.defaults.num_inference_steps
        mu = self.family.mu(self.family.tokens(shape), self.scheduler.config, steps)
        family = self.family
        return flow.sample(
            velocity, noise, self.scheduler, steps, mu, progress, family.scheduler_levels, family.rounds_levels
        )

    @property
    def ignores_guidance(self) -> bool:
        """Whether the guidance embedding says the same for every scale, as it may where one alone was trained."""
        embedders = [module for name, module in self.transformer.named_modules() if name.endswith("guidance_embedder")]
        return bool(embedders) and not any(bool(module.linear_2.weight.any()) for module in embedders)

    def guidance(self, scale: float | None, true_cfg_scale: float | None = None, image: float = 1.0) -> Guidance:
        """What `guidance_scale` means for this model; None is the family's default."""
        scale = self.defaults.guidance_scale if scale is None else scale
        if self.family.distilled_guidance(self.transformer.config):
            return Guidance(embedded=scale, prompt=1.0 if true_cfg_scale is None else true_cfg_scale, image=image)
        if self.family.distilled(self.pipe.config, self.transformer.config) is not None:
            scale = 1.0  # it has learnt the guidance: the pipelines do not look at a scale either
        return Guidance(prompt=scale if true_cfg_scale is None else true_cfg_scale, image=image)


def usual_size(family: Family, references: Sequence[Extent], area: int | None) -> Extent:
    """(width, height) of a picture of which none is asked for: as a reference is seen, or a square without any.

    Args:
        references: (width, height) of each as it is.
        area: as in `Family.size`.
    """
    own = references[family.sizing_reference] if references else (1, 1)
    return family.size(*own, area, len(references))


def check_prompt(
    family: Family, pipe: DiffusionPipeline, prompt: str, size: Extent, references: References
) -> str | None:
    """Refuse a prompt, or references, that the family's encoders do not take; how much is read where that is not all.

    Args:
        pipe: its tokenizers.
        size: (width, height) of the picture.

    Raises:
        PredictionError: names what is wrong with them.
    """
    for place, fault in reference_faults(family, references):
        raise PredictionError(f"reference {place + 1}: {fault}")
    faults, read = prompt_faults(family, pipe, prompt, size, references)
    if faults:
        raise PredictionError(f"the prompt {prompt[:60]!r}{'...' if len(prompt) > 60 else ''}: {faults[0]}")
    return read


def check_request(
    family: Family, images: Sized, width: int | None, height: int | None, steps: int | None = None
) -> None:
    """Refuse what the family cannot draw; nothing needs to be loaded for it. Of the references only the number counts.

    Raises:
        PredictionError: see `Predictor.predict`.
    """
    if len(images) and not family.max_references:
        raise PredictionError(family.takes_none)
    if len(images) > family.max_references:
        raise PredictionError(
            f"{family.name} sees at most {family.max_references} reference(s), {len(images)} were given"
        )
    if steps is not None and steps < 1:
        raise PredictionError(f"{steps} inference steps: give at least 1, or none for the model's own")
    if width is None and height is None and (len(images) or not family.max_references):
        return
    if width is None or height is None:
        raise PredictionError("give width and height together, or a picture to take the size from")
    multiple = family.side_multiple
    if width < multiple or height < multiple or width % multiple or height % multiple:
        raise PredictionError(f"width={width} and height={height} must be multiples of {multiple} for {family.name}")
