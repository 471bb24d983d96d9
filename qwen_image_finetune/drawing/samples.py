"""Pictures drawn while training, as prediction would draw them, side by side with what they are to be compared with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


class Sampler:
    """Draws the same pairs with the same noise every time."""

    def __init__(
        self,
        config: Config,
        rows: EncodedDataset,
        pipe: DiffusionPipeline | None,
        transformer: ModelMixin,
        device: torch.device,
    ) -> None:
        """
        Args:
            pipe: encoders that are loaded anyway; None reads the cache and loads the VAE for each round.
            transformer: the one that is trained, without the wrappers of several processes.
        """
        self.settings, self.rows, self.pipe, self.transformer = config.validation, rows, pipe, transformer
        self.device, self.precision = device, config.train.mixed_precision
        # Weights that are trained themselves are float32; a frozen base has its precision already, as in prediction.
        self.autocast = config.model.lora is None and self.precision != "no"
        self.chosen = spread(self.settings.num_validation_samples, len(rows.dataset))

    def draw(self, title: str, shown: bool, check: Callable[[], None]) -> list[Image.Image]:
        """The pictures of all chosen pairs.

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
        with console.progress(title, len(self.chosen), shown=shown) as update:
            for done, index in enumerate(self.chosen, start=1):
                drawn.append(self._draw(predictor, index, check))
                update(done)
        return drawn

    def row(self, index: int, prompt: str | None = None) -> Encoded:
        """A pair as the model is fed, with its own or another prompt."""
        variant = TextVariant(prompt)
        if self.pipe is None:
            return self.rows.read(index, variant)
        return self.rows.encode(self.pipe, self.rows.example(index), variant)

    def examples(self) -> list[Example]:
        """The pictures of the chosen pairs, as they are drawn."""
        return [self.rows.example(index) for index in self.chosen]

    def strips(
        self, examples: Sequence[Example], drawn: Sequence[Image.Image], base: Sequence[Image.Image] | None
    ) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """(strips, their layout): references, base, what was drawn, and the truth, at the height of the drawn picture.

        Args:
            base: what the base drew; None where that cannot be known any more.
        """
        strips, layout = [], []
        for place, (example, picture) in enumerate(zip(examples, drawn, strict=True)):
            parts = [("reference", reference) for reference in example.references]
            parts += [] if base is None else [("base", base[place])]
            parts += [("drawn", picture), ("truth", example.target)]
            strip, places = side_by_side(parts, picture.height)
            strips.append(strip)
            layout.append({"key": example.key, "prompt": example.prompt, "parts": places})
        return strips, layout

    def _draw(self, predictor: Predictor, index: int, check: Callable[[], None]) -> Image.Image:
        guidance = predictor.guidance(self.settings.guidance_scale)
        wanted = self._batch(index, None)
        negative = None if guidance.prompt == 1.0 else self._batch(index, self.rows.family.negative_prompt)
        dtype = loading.weight_dtype(self.precision)
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=self.autocast):
            latents = predictor.sample(
                Conditions(wanted, negative), guidance, [self.settings.seed + index],
                self.settings.num_inference_steps, lambda step: check(),
            )  # fmt: skip
        return self.rows.family.decode(predictor.pipe, latents)[0]

    def _batch(self, index: int, prompt: str | None) -> Batch:
        return collate([self.row(index, prompt)])


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
