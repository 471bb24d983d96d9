"""Samples during training, drawn as prediction would, without touching the run: its weights, mode or random state."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from qwen_image_finetune import console, loading
from qwen_image_finetune.cache import EncodedDataset, TextVariant
from qwen_image_finetune.config import Config
from qwen_image_finetune.data.images import resize
from qwen_image_finetune.files import clean_leftovers, write_atomic
from qwen_image_finetune.predict import Conditions, Predictor
from qwen_image_finetune.records import Batch, collate
from qwen_image_finetune.trackers import Trackers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


class _Cancelled(Exception):
    """Somebody waits for the process to end."""


class Validation:
    """Draws the same pairs with the same noise every time."""

    def __init__(
        self,
        config: Config,
        rows: EncodedDataset,
        pipe: DiffusionPipeline | None,
        transformer: ModelMixin,
        device: torch.device,
        run: Path | None,
        trackers: Trackers | None,
    ) -> None:
        """
        Args:
            pipe: encoders that are loaded anyway; None reads the cache and loads the VAE for each round.
            transformer: the one that is trained, without the wrappers of several processes.
            run: version folder; None keeps nothing, and draws only because others need its part of the model.
        """
        self.settings, self.rows, self.pipe, self.transformer = config.validation, rows, pipe, transformer
        self.device, self.folder, self.trackers = device, None if run is None else run / "samples", trackers
        for killed in [] if self.folder is None else self.folder.glob("step-*"):
            clean_leftovers(killed)
        self.dtype = loading.encoder_dtype(config.train.mixed_precision)
        self.precision = config.train.mixed_precision
        number = min(self.settings.num_validation_samples, len(rows.dataset))
        self.chosen = [round(place * (len(rows.dataset) - 1) / max(number - 1, 1)) for place in range(number)]

    def __call__(self, step: int, cancelled: Callable[[], bool] = lambda: False) -> list[Path]:
        """Draw, save beside reference and truth, and report; returns the files.

        Args:
            cancelled: asked between sampler steps; once it says so, this round is given up and nothing is saved.
        """
        pipe = self.pipe or loading.load_encoders(
            self.rows.family, self.rows.checkpoint, self.dtype, {"default": self.device}, text=False
        )
        scheduler = loading.load_scheduler(self.rows.checkpoint)
        predictor = Predictor(self.rows.family, pipe, self.transformer, scheduler)
        was_training = self.transformer.training
        self.transformer.eval()
        strips = []
        try:
            with console.progress(f"samples of step {step}", len(self.chosen), shown=self.folder is not None) as update:
                for done, index in enumerate(self.chosen, start=1):
                    strips.append(self._strip(index, self._draw(predictor, index, cancelled)))
                    update(done)
        except _Cancelled:
            return []
        finally:
            self.transformer.train(was_training)
        if self.folder is None:
            return []
        folder = self.folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{place}.png" for place in range(len(strips))]
        for strip, file in zip(strips, files, strict=True):
            content = io.BytesIO()
            strip.save(content, "PNG")
            write_atomic(file, content.getvalue())
        if self.trackers is not None:
            self.trackers.pictures("samples", strips, step)
        return files

    def _draw(self, predictor: Predictor, index: int, cancelled: Callable[[], bool]) -> Image.Image:
        def go_on(step: int) -> None:
            if cancelled():
                raise _Cancelled

        guidance = predictor.guidance(self.settings.guidance_scale)
        wanted = self._batch(index, None)
        negative = None if guidance.prompt == 1.0 else self._batch(index, self.rows.family.negative_prompt)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            latents = predictor.sample(
                Conditions(wanted, negative), guidance, [self.settings.seed + index], self.dtype,
                self.settings.num_inference_steps, go_on,
            )  # fmt: skip
        return self.rows.family.decode(predictor.pipe, latents)[0]

    def _batch(self, index: int, prompt: str | None) -> Batch:
        variant = TextVariant(prompt)
        if self.pipe is None:
            row = self.rows.read(index, variant)
        else:
            row = self.rows.encode(self.pipe, self.rows.dataset.load(index), variant)
        return collate([row]).to(self.device, loading.weight_dtype(self.precision))

    def _strip(self, index: int, drawn: Image.Image) -> Image.Image:
        """References, what was drawn, and the truth, side by side at the height of the drawn picture."""
        example = self.rows.dataset.load(index)
        pictures = [*example.references, drawn, example.target]
        scaled = [resize(picture, (max(round(picture.width * drawn.height / picture.height), 1), drawn.height))
                  for picture in pictures]  # fmt: skip
        strip = Image.new("RGB", (sum(picture.width for picture in scaled), drawn.height))
        left = 0
        for picture in scaled:
            strip.paste(picture, (left, 0))
            left += picture.width
        return strip
