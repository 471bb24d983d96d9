"""The samples of one process as training meets them: in the order of the batches, read before they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from qwen_image_finetune import cache
from qwen_image_finetune.cache import TextVariant
from qwen_image_finetune.config import DataConfig
from qwen_image_finetune.data.batches import MicroBatch
from qwen_image_finetune.job import Job
from qwen_image_finetune.records import Batch, Example, collate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def micro_batches(job: Job, pipe: DiffusionPipeline | None, first_step: int) -> Iterator[tuple[MicroBatch, Batch]]:
    """This process's micro-batches from `first_step` to the end of the run.

    Args:
        pipe: encodes the samples on the way; None reads the cache.
    """
    source = _Numbered(job, cached=pipe is None)
    span = range(first_step * source.accumulation, job.total_steps * source.accumulation)
    for micro, items in _read_ahead(source, span, job.config.data):
        if pipe is None:
            yield micro, items
        else:
            variants = row_variants(micro)
            encoded = [
                job.rows.encode(pipe, example, variant) for example, variant in zip(items, variants, strict=True)
            ]
            yield micro, collate(encoded)


def _read_ahead(source: _Numbered, span: range, settings: DataConfig) -> Iterator[tuple[MicroBatch, Any]]:
    """The numbered micro-batches in order, read by worker processes, or by threads where there are none."""
    if settings.num_workers == 0:
        yield from (loaded for _, loaded in cache.ahead(span, source.__getitem__, settings.prefetch_factor))
        return
    yield from torch.utils.data.DataLoader(
        source,
        batch_size=None,
        sampler=span,
        num_workers=settings.num_workers,
        prefetch_factor=settings.prefetch_factor,
    )


class _Numbered(torch.utils.data.Dataset[tuple[MicroBatch, Any]]):
    """Micro-batches of one process by their number since the start of training."""

    def __init__(self, job: Job, cached: bool) -> None:
        # Worker processes get a copy of this: no more of the job than it needs.
        self.rows, self.batches, self.cached = job.rows, job.batches, cached
        self.rank, self.processes = job.team.rank, job.team.size
        self.accumulation = job.config.train.gradient_accumulation_steps

    def __getitem__(self, number: int) -> tuple[MicroBatch, Batch | list[Example]]:
        step, place = divmod(number, self.accumulation)
        micro = self.batches.at(step)[place * self.processes + self.rank]
        if self.cached:
            # Stacked here: a few large tensors pass from a worker process sooner than several for each sample.
            variants = row_variants(micro)
            samples = zip(micro.rows, variants, strict=True)
            return micro, collate([self.rows.read(row, variant, micro.visit) for row, variant in samples])
        return micro, [self.rows.dataset.load(row, micro.visit) for row in micro.rows]


def row_variants(micro: MicroBatch) -> list[TextVariant]:
    """How each row of a micro-batch is described to the model."""
    return [TextVariant("" if dropped else None, not micro.drop_references) for dropped in micro.drop_caption]


def sample_keys(job: Job, step: int) -> list[str]:
    """Keys of the rows that a step (0-based) trained on, in all processes."""
    return [job.rows.dataset.rows[row].key for micro in job.batches.at(step) for row in micro.rows]
