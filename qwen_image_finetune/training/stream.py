"""The samples of one process as training meets them: in the order of the batches, read before they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qwen_image_finetune import flow
from qwen_image_finetune.config import DataConfig
from qwen_image_finetune.data.batches import MicroBatch, stratified
from qwen_image_finetune.encoding import cache
from qwen_image_finetune.encoding.cache import EncodedDataset, TextVariant
from qwen_image_finetune.records import Batch, Example, collate
from qwen_image_finetune.training.job import Job

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Asked(NamedTuple):
    """What the model is asked that is not the edit, as its own answer is preserved."""

    micro: MicroBatch  # of the same pairs, or of those of loss.preservation.dataset_path
    batch: Batch


class Loaded(NamedTuple):
    """A micro-batch, and what the model is given of it."""

    micro: MicroBatch
    batch: Batch
    preserved: Asked | None = None


def micro_batches(job: Job, pipe: DiffusionPipeline | None, first_step: int) -> Iterator[Loaded]:
    """This process's micro-batches from `first_step` to the end of the run.

    Args:
        pipe: encodes the samples on the way; None reads the cache.
    """
    reader = _Reader(job.rows, job.preserved, job.config.train.seed, cached=pipe is None)
    for (micro, other), (first, second) in _read_ahead(reader, own_micro_batches(job, first_step), job.config.data):
        asked = micro if other is None else other
        if pipe is None:
            yield Loaded(micro, first, None if second is None else Asked(asked, second))
            continue
        variants = row_variants(micro)
        encoded = [job.rows.encode(pipe, example, variant) for example, variant in zip(first, variants, strict=True)]
        if job.preserved is not None:
            preserved = [job.preserved.encode(pipe, example) for example in second]
        else:
            others = reader.preserved_variants(micro)
            preserved = [
                replace(row, text=job.rows.encode_text(pipe, example, variant))
                for row, example, variant in zip(encoded, first, others, strict=bool(others))
            ]
        yield Loaded(micro, collate(encoded), Asked(asked, collate(preserved)) if preserved else None)


_Micros = tuple[MicroBatch, MicroBatch | None]  # of the pairs, and of those of loss.preservation.dataset_path


def own_micro_batches(job: Job, first_step: int) -> Iterator[_Micros]:
    """Which rows this process trains on, from `first_step` to the end of the run, and which pairs of
    loss.preservation.dataset_path beside them.

    Drawn by whoever asks for the next one, not by those that read the rows: `Batches` is not made for several threads.
    """
    for step in range(first_step, job.total_steps):
        micros = job.batches.at(step)
        if job.config.train.sigma_stratified:
            micros = stratified(micros, job.config.train.seed, step)
        others = None if job.preserved_batches is None else job.preserved_batches.at(step)
        for turn in range(job.config.train.gradient_accumulation_steps):
            place = turn * job.team.size + job.team.rank
            yield micros[place], None if others is None else others[place]


def _read_ahead(reader: _Reader, micros: Iterator[_Micros], settings: DataConfig) -> Iterator[tuple[_Micros, Any]]:
    """The micro-batches in order, read by worker processes, or by threads where there are none."""
    if settings.num_workers == 0:
        yield from (loaded for _, loaded in cache.ahead(micros, reader.__getitem__, settings.prefetch_factor))
        return
    yield from torch.utils.data.DataLoader(
        reader,
        batch_size=None,
        sampler=micros,
        num_workers=settings.num_workers,
        prefetch_factor=settings.prefetch_factor,
    )


class _Reader(torch.utils.data.Dataset[tuple[_Micros, Any]]):
    """Reads what belongs to a micro-batch. Worker processes get a copy of it."""

    def __init__(self, rows: EncodedDataset, preserved: EncodedDataset | None, seed: int, cached: bool) -> None:
        self.rows, self.preserved, self.seed, self.cached = rows, preserved, seed, cached

    def __getitem__(self, micros: _Micros) -> tuple[_Micros, tuple[Any, Any]]:
        """The micro-batches, and what was read for both: batches, or, without the cache, lists of examples."""
        micro, other = micros
        if not self.cached:
            return micros, (_examples(self.rows, micro), other and _examples(self.preserved or self.rows, other))
        # Stacked here: a few large tensors pass from a worker process sooner than several for each sample.
        batch = self.rows.read_batch(micro.rows, row_variants(micro), micro.visits)
        if other is not None and self.preserved is not None:
            return micros, (batch, self.preserved.read_batch(other.rows, row_variants(other), other.visits))
        others = self.preserved_variants(micro)
        return micros, (batch, self.rows.read_batch(micro.rows, others, micro.visits) if others else None)

    def preserved_variants(self, micro: MicroBatch) -> list[TextVariant]:
        """Each row with one of the prompts of loss.preservation, drawn by the row and its visit; [] without any.

        So a resumed run, another number of processes or another batch size meets the same.
        """
        prompts, rows = self.rows.preserved, self.rows.dataset.rows
        if not prompts:
            return []
        seen = zip(micro.rows, micro.visits, strict=True)
        drawn = [flow.seed_of("preservation", self.seed, rows[row].key, visit) for row, visit in seen]
        return [TextVariant(prompts[number % len(prompts)], not micro.drop_references) for number in drawn]


def _examples(rows: EncodedDataset, micro: MicroBatch) -> list[Example]:
    return [rows.dataset.load(row, visit) for row, visit in zip(micro.rows, micro.visits, strict=True)]


def row_variants(micro: MicroBatch) -> list[TextVariant]:
    """How each row of a micro-batch is described to the model."""
    return [TextVariant("" if dropped else None, not micro.drop_references) for dropped in micro.drop_caption]


def sample_keys(job: Job, step: int) -> list[str]:
    """Keys of the rows that a step (0-based) trained on, in all processes."""
    return [job.rows.dataset.rows[row].key for micro in job.batches.at(step) for row in micro.rows]
