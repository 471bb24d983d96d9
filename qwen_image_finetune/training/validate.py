"""Validation while training: samples and the held-out loss, without touching the run's weights, mode or random state.

Everything random has generators of its own, gradients are not asked for, and the base is the trained model with its
adapter at strength 0: so the trained weights are the same to the bit with and without validation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qwen_image_finetune.config import Config
from qwen_image_finetune.data.images import open_upright
from qwen_image_finetune.data.part import spread
from qwen_image_finetune.disk import runs
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.reading import Unreadable, read_json
from qwen_image_finetune.drawing import samples
from qwen_image_finetune.judging import metrics
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.machine import console
from qwen_image_finetune.records import Example
from qwen_image_finetune.training.assembly import Learner
from qwen_image_finetune.training.average import Average
from qwen_image_finetune.training.held_out_loss import HeldOutLoss
from qwen_image_finetune.training.job import Job
from qwen_image_finetune.training.logbook import Logbook
from qwen_image_finetune.training.objective import Objective
from qwen_image_finetune.training.online import Table
from qwen_image_finetune.training.trackers import Trackers
from qwen_image_finetune.training.verdict import Best, Measured, beside, constant, verdict

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAMPLED = ("psnr", "colour_drift", "displacement")  # of each round of samples
BASE = "base"  # folder of what the base draws, and file of its losses


class _Cancelled(Exception):
    """Somebody waits for the process to end."""


@dataclass(frozen=True)
class Seen:
    """What a model does."""

    losses: list[float]  # of the held-out pairs
    pictures: list[Image.Image]


def open_validation(
    job: Job, book: Logbook, learner: Learner, objective: Objective, pipe: DiffusionPipeline | None
) -> Validation | None:
    """The validation of a run, in the processes that take part in it: the first one, or all that share the model."""
    settings = job.config.validation
    if not settings.enabled or not (job.team.main or job.sharding):
        return None
    loss = None if job.held_out is None else HeldOutLoss(objective, settings)
    shown = job.rows if job.held_out is None else job.held_out
    sampler = samples.Sampler(job.config, shown, pipe, learner.transformer, job.accelerator.device, job.asked)
    return Validation(job.config, sampler, book.run, book.trackers, loss, learner.average, learner.as_used)


class Validation:
    """Draws the same pairs with the same noise every time, and measures the same losses."""

    def __init__(
        self,
        config: Config,
        sampler: samples.Sampler,
        run: runs.Run | None,
        trackers: Trackers | None,
        loss: HeldOutLoss | None,
        average: Average | None,
        as_used: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """
        Args:
            sampler: of the held-out pairs, or of the training's own where none are held out.
            run: the version; None keeps nothing, and works only because others need its part of the model.
            loss: None where no pairs are held out: on the training's own it would say nothing.
            average: of the trained weights; it is measured and drawn beside them.
            as_used: around looking at the weights: `Learner.as_used`.
        """
        self.config, self.sampler, self.run, self.trackers = config, sampler, run, trackers
        self.average, self.as_used = average, as_used
        self.rows, self.transformer = sampler.rows, sampler.transformer
        number = config.validation.num_loss_pairs if loss else 0
        self.loss, self.measured_rows = loss, spread(number, len(self.rows.dataset)) if number else []
        self.folder = None if run is None else run.path / "samples"
        self.best = Best(run) if run is not None and self.measured_rows else None
        self.base: Seen | None = None  # before anything was learnt
        self.last: Measured | None = None

    def start(self, step: int) -> None:
        """Find out what the base does: from the run's folder if it stands there, else now.

        A fully tuned model is its own base only before its first step; resumed without that folder, it is compared with
        nothing, and that is said.
        """
        # Processes that share the model must do the same, and only the first can see the folder.
        known = None if parallel.is_sharded(self.transformer) else self._known_base()
        if known is not None:
            self.base = known
            return
        if self.config.model.lora is None and step > 0:
            if self.folder is not None:
                console.say("note: what the base did was not kept with this run, and the model is tuned as a whole: "
                            "held-out losses and samples are shown without it")  # fmt: skip
            return
        with self._at_rest(strength=0.0):
            losses = self._losses("held-out loss of the base", lambda: None)
            pictures = self.sampler.draw("samples of the base", self.shown, lambda: None)
        self.base = Seen(losses, pictures)
        if self.folder is not None:
            samples.save(self.folder / BASE, pictures)
            kept = {"of": self._identity(), "losses": losses}
            write_atomic(self.folder / f"{BASE}.json", json.dumps(kept) + "\n")

    def __call__(
        self, step: int, cancelled: Callable[[], bool], draw: bool, checkpoint: Callable[[], Path | None] | None
    ) -> bool:
        """Measure, draw, save beside references, base and truth, and report.

        The line in metrics.jsonl comes last: a round without one was not finished, and is made up for on resume.

        Args:
            cancelled: asked between sampler steps; once it says so, this round is given up and nothing is saved.
            draw: also draw samples.
            checkpoint: waits until this step is saved and says where, if it is to be; only then can it be pointed to as
                the best.

        Returns:
            Whether the round was finished.
        """

        def check() -> None:
            if cancelled():
                raise _Cancelled

        averaged = Seen([], [])
        try:
            with self.as_used():
                now = self._look(f"step {step}", check, draw)
            if self.average is not None and self.average.updates:
                with self.average.in_place():
                    averaged = self._look(f"the average at step {step}", check, draw)
        except _Cancelled:
            return False
        if self.run is None:
            return True
        values = {}
        if now.losses:
            mean = Measured(step, averaged.losses) if averaged.losses else None
            values = self._judge(Measured(step, now.losses), mean, checkpoint)
        if now.pictures:
            values |= self._keep(step, now.pictures, averaged.pictures)
        if self.trackers is not None:
            self.trackers.scalars(values, step)
        self.run.record(step, values)
        return True

    def _look(self, title: str, check: Callable[[], None], draw: bool) -> Seen:
        """What the transformer, as it is now, loses and draws."""
        with self._at_rest():
            losses = self._losses(f"held-out loss of {title}", check)
            return Seen(losses, self.sampler.draw(f"samples of {title}", self.shown, check) if draw else [])

    @property
    def shown(self) -> bool:
        """Whether progress is shown: by one process."""
        return self.folder is not None

    def _losses(self, title: str, check: Callable[[], None]) -> list[float]:
        if self.loss is None or not self.measured_rows:
            return []
        losses = []
        with console.progress(title, len(self.measured_rows), shown=self.shown) as update:
            for done, index in enumerate(self.measured_rows, start=1):
                losses.append(self.loss(self.sampler.row(index), check))
                update(done)
        return losses

    def _judge(
        self, now: Measured, averaged: Measured | None, checkpoint: Callable[[], Path | None] | None
    ) -> dict[str, float]:
        """Say what the losses mean, and point to the best checkpoint; returns numbers for the curves.

        Args:
            averaged: losses of the average of the weights, if there is one.
        """
        assert self.best is not None
        base = None if self.base is None else Measured(0, self.base.losses)
        for line in verdict(now, base, self.last, self.best.measured):
            console.say(line)
        if averaged is not None:
            console.say(beside(now, averaged))
        if self.trackers is not None:
            self.trackers.table("held_out_pairs", self._held_out(now, base), now.step)
        self.best.offer(now, base, None if checkpoint is None else checkpoint())
        self.last = now
        return now.values(base) | ({} if averaged is None else {"held_out_loss_average": averaged.mean})

    def _held_out(self, now: Measured, base: Measured | None) -> Table:
        """The losses of each pair, beside those of the base."""
        keys = [self.rows.dataset.rows[index].key for index in self.measured_rows]
        if base is None:
            return Table(("pair", "loss"), list(zip(keys, now.losses, strict=True)))
        together = zip(keys, now.losses, base.losses, strict=True)
        return Table(("pair", "loss", "base", "difference"), [(*row, row[1] - row[2]) for row in together])

    def _keep(self, step: int, drawn: list[Image.Image], averaged: list[Image.Image]) -> dict[str, float]:
        """Save the samples; returns measures of those of the weights themselves."""
        assert self.folder is not None
        examples = self.sampler.examples()
        base = None if self.base is None else self.base.pictures
        strips, layout = self.sampler.strips(examples, drawn, base, averaged or None)
        samples.save(self.folder / f"step-{step}", strips)
        samples.save_layout(self.folder / f"step-{step}", layout)
        if self.trackers is not None:
            self.trackers.pictures("samples", strips, [caption(about) for about in layout], step)
        pairs = [place for place, subject in enumerate(self.sampler.subjects) if subject.has_truth]
        examples, drawn = [examples[place] for place in pairs], [drawn[place] for place in pairs]
        if line := constant(step, drawn, [example.target for example in examples]):
            console.say(line)
        measured = sample_measures(examples, drawn)
        if self.trackers is not None:
            rows = [
                (example.key, example.prompt, *(one[name] for name in SAMPLED))
                for example, one in zip(examples, measured, strict=True)
            ]
            self.trackers.table("sample_measures", Table(("pair", "prompt", *SAMPLED), rows), step)
        return means(measured)

    def _known_base(self) -> Seen | None:
        if self.folder is None:
            return None
        files = [self.folder / BASE / f"{place}.png" for place in range(len(self.sampler.subjects))]
        try:
            kept = read_json(self.folder / f"{BASE}.json")
            if kept["of"] != self._identity():
                return None
            return Seen([float(loss) for loss in kept["losses"]], [open_upright(file) for file in files])
        except (Unreadable, OSError, KeyError, TypeError, ValueError):  # DataError is a ValueError
            return None  # it is found out again

    def _identity(self) -> str:
        """Changes with whatever decides what the base draws and loses."""
        config = self.config
        validation = config.validation.model_dump(exclude={"steps", "enabled", "share", "dataset_path", "samples"})
        train = config.train.model_dump(
            include={"mixed_precision", "sigma_distribution", "sigma_shift", "guidance_scale"}
        )
        model = config.model.model_dump(exclude={"lora"})
        keys = [[row.key, *self.rows.content(place)] for place, row in enumerate(self.rows.dataset.rows)]
        own = [subject for subject in self.sampler.subjects if not subject.has_truth]
        keys += [[str(subject.seed), *subject.rows.content(subject.index)] for subject in own]
        parts: list[Any] = [
            validation,
            train,
            model,
            config.loss.model_dump(exclude={"preservation"}),  # held-out pairs have the first term alone
            config.data.model_dump(mode="json", include={"class_path", "init_args"}),
            keys,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _at_rest(self, strength: float = 1.0) -> AbstractContextManager[None]:
        """The transformer as prediction has it, the adapter at `strength`."""
        return adapters.at_rest(self.transformer, None if self.config.model.lora is None else strength)


def sample_measures(examples: Sequence[Example], drawn: Sequence[Image.Image]) -> list[dict[str, float | None]]:
    """`SAMPLED` of each sample; None where it has no such measure."""
    found = []
    for example, picture in zip(examples, drawn, strict=True):
        source = samples.source_of(example)
        before = None if source is None else metrics.pixels(source)
        measured = metrics.measure(metrics.pixels(picture), metrics.pixels(example.target), before)
        found.append({name: measured[name] for name in SAMPLED})
    return found


def means(measured: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Means over the samples, for the curves; a measure that no sample has is left out."""
    present = {name: [value for one in measured if (value := one[name]) is not None] for name in SAMPLED}
    return {f"sample_{name}": math.fsum(column) / len(column) for name, column in present.items() if column}


def caption(about: Mapping[str, Any]) -> str:
    """What a strip shows, from its part of the layout: the pair, its prompt, and the pictures from left to right."""
    return f"{about['key']}: {about['prompt']} ({', '.join(part['name'] for part in about['parts'])})"
