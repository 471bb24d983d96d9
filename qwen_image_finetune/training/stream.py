"""The samples of one process as training meets them: in the order of the batches, read before they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qwen_image_finetune import flow
from qwen_image_finetune.config import DataConfig
from qwen_image_finetune.data.batches import MicroBatch
from qwen_image_finetune.encoding import cache
from qwen_image_finetune.encoding.cache import EncodedDataset, TextVariant
from qwen_image_finetune.records import Batch, Example, collate
from qwen_image_finetune.training.job import Job

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Loaded(NamedTuple):
    """A micro-batch, and what the model is given of it."""

    micro: MicroBatch
    batch: Batch
    preserved: Batch | None = None  # the same rows with prompts of loss.preservation, if that is asked for


def micro_batches(job: Job, pipe: DiffusionPipeline | None, first_step: int) -> Iterator[Loaded]:
    """This process's micro-batches from `first_step` to the end of the run.

    Args:
        pipe: encodes the samples on the way; None reads the cache.
    """
    reader = _Reader(job.rows, job.config.train.seed, cached=pipe is None)
    for micro, items in _read_ahead(reader, own_micro_batches(job, first_step), job.config.data):
        if pipe is None:
            yield Loaded(micro, *items)
            continue
        variants = row_variants(micro)
        encoded = [job.rows.encode(pipe, example, variant) for example, variant in zip(items, variants, strict=True)]
        others = reader.preserved_variants(micro)
        preserved = [
            replace(row, text=job.rows.encode_text(pipe, example, variant))
            for row, example, variant in zip(encoded, items, others, strict=bool(others))
        ]
        yield Loaded(micro, collate(encoded), collate(preserved) if preserved else None)


def own_micro_batches(job: Job, first_step: int) -> Iterator[MicroBatch]:
    """Which rows this process trains on, from `first_step` to the end of the run.

    Drawn by whoever asks for the next one, not by those that read the rows: `Batches` is not made for several threads.
    """
    for step in range(first_step, job.total_steps):
        micros = job.batches.at(step)
        for place in range(job.config.train.gradient_accumulation_steps):
            yield micros[place * job.team.size + job.team.rank]


def _read_ahead(
    reader: _Reader, micros: Iterator[MicroBatch], settings: DataConfig
) -> Iterator[tuple[MicroBatch, Any]]:
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


class _Reader(torch.utils.data.Dataset[tuple[MicroBatch, Any]]):
    """Reads what belongs to a micro-batch. Worker processes get a copy of it."""

    def __init__(self, rows: EncodedDataset, seed: int, cached: bool) -> None:
        self.rows, self.seed, self.cached = rows, seed, cached

    def __getitem__(self, micro: MicroBatch) -> tuple[MicroBatch, tuple[Batch, Batch | None] | list[Example]]:
        if not self.cached:
            seen = zip(micro.rows, micro.visits, strict=True)
            return micro, [self.rows.dataset.load(row, visit) for row, visit in seen]
        # Stacked here: a few large tensors pass from a worker process sooner than several for each sample.
        batch = self.rows.read_batch(micro.rows, row_variants(micro), micro.visits)
        others = self.preserved_variants(micro)
        return micro, (batch, self.rows.read_batch(micro.rows, others, micro.visits) if others else None)

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


def row_variants(micro: MicroBatch) -> list[TextVariant]:
    """How each row of a micro-batch is described to the model."""
    return [TextVariant("" if dropped else None, not micro.drop_references) for dropped in micro.drop_caption]


def sample_keys(job: Job, step: int) -> list[str]:
    """Keys of the rows that a step (0-based) trained on, in all processes."""
    return [job.rows.dataset.rows[row].key for micro in job.batches.at(step) for row in micro.rows]
