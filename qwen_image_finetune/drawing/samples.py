"""Pictures drawn while training, as prediction would draw them, side by side with what they are to be compared with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config
from qwen_image_finetune.data.images import resize
from qwen_image_finetune.data.part import spread
from qwen_image_finetune.data.writing import write_picture
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.drawing.predict import Conditions, Predictor
from qwen_image_finetune.encoding.cache import EncodedDataset, TextVariant
from qwen_image_finetune.machine import console
from qwen_image_finetune.records import Batch, Encoded, Example, collate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

LAYOUT = "layout.json"  # which part of the strips is which picture


@dataclass(frozen=True)
class Subject:
    """What is drawn in every round: a row, and the seed of its noise."""

    rows: EncodedDataset
    index: int
    seed: int
    has_truth: bool  # False: a prompt of one's own, of which nobody knows what is right


class Sampler:
    """Draws the same pairs, and the same prompts of one's own, with the same noise every time."""

    def __init__(
        self,
        config: Config,
        rows: EncodedDataset,
        pipe: DiffusionPipeline | None,
        transformer: ModelMixin,
        device: torch.device,
        asked: EncodedDataset | None = None,
    ) -> None:
        """
        Args:
            rows: pairs, of which `validation.num_validation_samples` are drawn.
            pipe: encoders that are loaded anyway; None reads the cache and loads the VAE for each round.
            transformer: the one that is trained, without the wrappers of several processes.
            asked: rows of `validation.samples`.
        """
        self.settings, self.rows, self.pipe, self.transformer = config.validation, rows, pipe, transformer
        self.device, self.precision = device, config.train.mixed_precision
        # Weights that are trained themselves are float32; a frozen base has its precision already, as in prediction.
        self.autocast = config.model.lora is None and self.precision != "no"
        seed = self.settings.seed
        chosen = spread(self.settings.num_validation_samples, len(rows.dataset))
        self.subjects = [Subject(rows, index, seed + index, has_truth=True) for index in chosen]
        if asked is not None:
            seeds = [seed if sample.seed is None else sample.seed for sample in self.settings.samples]
            self.subjects += [Subject(asked, index, own, has_truth=False) for index, own in enumerate(seeds)]

    def draw(self, title: str, shown: bool, check: Callable[[], None]) -> list[Image.Image]:
        """The pictures of all subjects.

        Args:
            shown: report progress.
            check: called between sampler steps; may raise to give the round up.
        """
        pipe = self.pipe or loading.load_encoders(
            self.rows.family,
            self.rows.checkpoint,
            loading.encoder_dtype(self.precision),
            {"default": self.device},
            text=False,
        )
        scheduler, dtype = loading.load_scheduler(self.rows.checkpoint), loading.weight_dtype(self.precision)
        predictor = Predictor(self.rows.family, pipe, self.transformer, scheduler, dtype=dtype)
        drawn = []
        with console.progress(title, len(self.subjects), shown=shown) as update:
            for done, subject in enumerate(self.subjects, start=1):
                drawn.append(self._draw(predictor, subject, check))
                update(done)
        return drawn

    def row(self, index: int) -> Encoded:
        """A pair as the model is fed."""
        return self._encoded(self.rows, index, None)

    def _encoded(self, rows: EncodedDataset, index: int, prompt: str | None) -> Encoded:
        variant = TextVariant(prompt)
        if self.pipe is None:
            return rows.read(index, variant)
        return rows.encode(self.pipe, rows.example(index), variant)

    def examples(self) -> list[Example]:
        """The pictures of all subjects, as they are drawn; the target of one without a truth only has its size."""
        return [subject.rows.example(subject.index) for subject in self.subjects]

    def strips(
        self,
        examples: Sequence[Example],
        drawn: Sequence[Image.Image],
        base: Sequence[Image.Image] | None,
        averaged: Sequence[Image.Image] | None = None,
    ) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """(strips, their layout): references, base, what was drawn, the same by the weights' average, and the truth
        where it is known, at the height of the drawn picture.

        Args:
            base: what the base drew; None where that cannot be known any more.
            averaged: what the average of the trained weights drew; None where there is none.
        """
        strips, layout = [], []
        subjects = zip(self.subjects, examples, drawn, strict=True)
        for place, (subject, example, picture) in enumerate(subjects):
            parts = [("reference", reference) for reference in example.references]
            parts += [] if base is None else [("base", base[place])]
            parts += [("drawn", picture)] + ([] if averaged is None else [("averaged", averaged[place])])
            parts += [("truth", example.target)] * subject.has_truth
            strip, places = side_by_side(parts, picture.height)
            strips.append(strip)
            layout.append({"key": example.key, "prompt": example.prompt, "parts": places})
        return strips, layout

    def _draw(self, predictor: Predictor, subject: Subject, check: Callable[[], None]) -> Image.Image:
        guidance = predictor.guidance(self.settings.guidance_scale)
        wanted = self._batch(subject, None)
        negative = None if guidance.prompt == 1.0 else self._batch(subject, self.rows.family.negative_prompt)
        dtype = loading.weight_dtype(self.precision)
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=self.autocast):
            latents = predictor.sample(
                Conditions(wanted, negative), guidance, [subject.seed],
                self.settings.num_inference_steps, lambda step: check(),
            )  # fmt: skip
        return self.rows.family.decode(predictor.pipe, latents)[0]

    def _batch(self, subject: Subject, prompt: str | None) -> Batch:
        return collate([self._encoded(subject.rows, subject.index, prompt)])


def source_of(example: Example) -> Image.Image | None:
    """What was edited, at the size of the truth: the (first) reference; None for a picture from a prompt alone."""
    return resize(example.references[0], example.target.size) if example.references else None


def side_by_side(
    parts: Sequence[tuple[str, Image.Image]], height: int
) -> tuple[Image.Image, list[dict[str, str | int]]]:
    """One picture of several, all of one height, and the name, left edge and width of each."""
    scaled = [
        (name, resize(picture, (max(round(picture.width * height / picture.height), 1), height)))
        for name, picture in parts
    ]
    strip = Image.new("RGB", (sum(picture.width for _, picture in scaled), height))
    left, places = 0, list[dict[str, str | int]]()
    for name, picture in scaled:
        strip.paste(picture, (left, 0))
        places.append({"name": name, "left": left, "width": picture.width})
        left += picture.width
    return strip, places


def save(folder: Path, pictures: Sequence[Image.Image]) -> list[Path]:
    """Write pictures as 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{place}.png" for place in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        write_picture(file, picture)
    return files


def save_layout(folder: Path, layout: Sequence[dict[str, Any]]) -> None:
    """Write beside the strips which part of each is which picture."""
    write_atomic(folder / LAYOUT, json.dumps(layout, indent=1, ensure_ascii=False) + "\n")
