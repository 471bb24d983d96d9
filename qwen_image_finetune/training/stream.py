"""The samples of one process as training meets them: in the order of the batches, read before they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from qwen_image_finetune.config import DataConfig
from qwen_image_finetune.data.batches import MicroBatch
from qwen_image_finetune.encoding import cache
from qwen_image_finetune.encoding.cache import EncodedDataset, TextVariant
from qwen_image_finetune.records import Batch, Example, collate
from qwen_image_finetune.training.job import Job

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def micro_batches(job: Job, pipe: DiffusionPipeline | None, first_step: int) -> Iterator[tuple[MicroBatch, Batch]]:
    """This process's micro-batches from `first_step` to the end of the run.

    Args:
        pipe: encodes the samples on the way; None reads the cache.
    """
    reader = _Reader(job.rows, cached=pipe is None)
    for micro, items in _read_ahead(reader, own_micro_batches(job, first_step), job.config.data):
        if pipe is None:
            yield micro, items
        else:
            variants = row_variants(micro)
            encoded = [
                job.rows.encode(pipe, example, variant) for example, variant in zip(items, variants, strict=True)
            ]
            yield micro, collate(encoded)


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

    def __init__(self, rows: EncodedDataset, cached: bool) -> None:
        self.rows, self.cached = rows, cached

    def __getitem__(self, micro: MicroBatch) -> tuple[MicroBatch, Batch | list[Example]]:
        if self.cached:
            # Stacked here: a few large tensors pass from a worker process sooner than several for each sample.
            return micro, self.rows.read_batch(micro.rows, row_variants(micro), micro.visits)
        seen = zip(micro.rows, micro.visits, strict=True)
        return micro, [self.rows.dataset.load(row, visit) for row, visit in seen]


def row_variants(micro: MicroBatch) -> list[TextVariant]:
    """How each row of a micro-batch is described to the model."""
    return [TextVariant("" if dropped else None, not micro.drop_references) for dropped in micro.drop_caption]


def sample_keys(job: Job, step: int) -> list[str]:
    """Keys of the rows that a step (0-based) trained on, in all processes."""
    return [job.rows.dataset.rows[row].key for micro in job.batches.at(step) for row in micro.rows]
