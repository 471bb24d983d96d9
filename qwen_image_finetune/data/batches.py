"""The order of batches: a function of the seed and the step, whatever the number of processes. Needs numpy alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one geometry that go through the model together, in one process."""

    rows: tuple[int, ...]
    visit: int  # how often each of its rows was seen before: the epoch
    drop_caption: tuple[bool, ...]  # per row: train on the empty prompt
    drop_references: bool  # train without the references


class Batches:
    """Which rows each optimizer step trains on.

    Every epoch visits every row once. Epochs follow each other in one stream of micro-batches, and an optimizer step
    takes the next `micro_batches_per_step` of them, so that a step may begin in one epoch and end in the next.
    """

    def __init__(
        self,
        geometries: Sequence[Hashable],
        geometries_without_references: Sequence[Hashable],
        *,
        batch_size: int,
        micro_batches_per_step: int,
        seed: int,
        shuffle: bool,
        caption_dropout_rate: float,
        reference_dropout_rate: float,
    ) -> None:
        """
        Args:
            geometries: of each row; rows with equal ones can share a batch.
            geometries_without_references: the same, once the references of the row are dropped.
            batch_size: rows of a micro-batch; fewer where a geometry runs out.
            micro_batches_per_step: gradient accumulation times processes.
            shuffle: a new order every epoch; otherwise rows keep their order, as far as geometries allow.
            caption_dropout_rate: share of visits to a row with the empty prompt.
            reference_dropout_rate: share of visits without references, independent of the former.

        Raises:
            ValueError: no rows.
        """
        if not len(geometries):
            raise ValueError("no rows to make batches of")
        numbers: dict[tuple[bool, Hashable], int] = {}
        kept = [numbers.setdefault((False, geometry), len(numbers)) for geometry in geometries]
        # Where nothing is dropped, dropping is no matter: a row without references stays with its like.
        dropped = [
            numbers.setdefault((without != geometry, without), len(numbers))
            for geometry, without in zip(geometries, geometries_without_references, strict=True)
        ]
        self._groups: NDArray[np.int32] = np.array([kept, dropped], dtype=np.int32)  # (2, rows): whole, dropped
        self._without_references = np.array([flag for flag, _ in numbers], dtype=bool)  # (groups,)
        self._batch_size = batch_size
        self._per_step = micro_batches_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._caption_rate = caption_dropout_rate
        self._reference_rate = reference_dropout_rate
        self._ends: list[int] = [0]  # micro-batches of the first 0, 1, 2, ... epochs
        self._recent: dict[int, _Epoch] = {}

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """All micro-batches of an epoch (0-based)."""
        order = self._order(epoch)
        return [order.batch(place) for place in range(len(order))]

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step (0-based), of all processes."""
        epoch = self.epoch_of(step)
        place = step * self._per_step - self._end(epoch)
        batches: list[MicroBatch] = []
        while len(batches) < self._per_step:
            order = self._order(epoch)
            end = min(len(order), place + self._per_step - len(batches))
            batches += [order.batch(each) for each in range(place, end)]
            epoch, place = epoch + 1, 0
        return batches

    def steps(self, epochs: int) -> int:
        """Optimizer steps until that many epochs are over; the last one may reach into the next epoch."""
        return -(-self._end(epochs) // self._per_step)

    def epoch_of(self, step: int) -> int:
        """The epoch in which the first micro-batch of a step lies."""
        first = step * self._per_step
        if self._reference_rate == 0:
            return first // self._end(1)
        while self._ends[-1] <= first:
            self._end(len(self._ends))
        return int(np.searchsorted(self._ends, first, side="right")) - 1

    def _end(self, epochs: int) -> int:
        """Micro-batches of the first `epochs` epochs. Needs the draws of dropped references, but no permutation."""
        if self._reference_rate == 0 and len(self._ends) > 1:  # every epoch has as many as the first
            return epochs * self._ends[1]
        while len(self._ends) <= epochs:
            sizes = np.bincount(self._draw(len(self._ends) - 1)[2])  # rows per group
            self._ends.append(self._ends[-1] + int((-(-sizes // self._batch_size)).sum()))
        return self._ends[epochs]

    def _draw(self, epoch: int) -> tuple[np.random.Generator, NDArray[np.bool_], NDArray[np.int32]]:
        """(generator after the drops, whether each row's caption is dropped (rows,), group of each row (rows,))."""
        generator = np.random.Generator(np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)))
        rows = self._groups.shape[1]
        drop_caption = np.asarray(generator.random(rows) < self._caption_rate)
        drop_references = generator.random(rows) < self._reference_rate
        return generator, drop_caption, np.where(drop_references, self._groups[1], self._groups[0])

    def _order(self, epoch: int) -> _Epoch:
        if epoch not in self._recent:
            generator, drop_caption, groups = self._draw(epoch)
            order = generator.permutation(len(groups)) if self._shuffle else np.arange(len(groups))
            if len(self._recent) > 1:  # a step that straddles needs two
                del self._recent[max(self._recent, key=lambda kept: abs(kept - epoch))]
            self._recent[epoch] = _Epoch(epoch, order, groups, drop_caption, self._without_references, self._batch_size)
        return self._recent[epoch]


class _Epoch:
    """One epoch in arrays; its micro-batches are made when asked for."""

    def __init__(
        self,
        epoch: int,
        order: NDArray[np.int64],
        groups: NDArray[np.int32],
        drop_caption: NDArray[np.bool_],
        without_references: NDArray[np.bool_],
        batch_size: int,
    ) -> None:
        self._epoch, self._groups, self._drop_caption = epoch, groups, drop_caption
        self._without_references = without_references
        # Rows group after group, each group in the order of the permutation.
        places = np.argsort(groups[order], kind="stable")  # (rows,) places in the permutation
        self._rows = order[places]
        sorted_groups = groups[self._rows]
        begins = np.flatnonzero(np.diff(sorted_groups, prepend=-1))  # where a group begins
        sizes = np.diff(begins, append=len(order))
        within = np.arange(len(order)) - np.repeat(begins, sizes)
        starts = np.flatnonzero(within % batch_size == 0)  # where a chunk begins
        ends = np.append(starts[1:], len(order))
        by_first = np.argsort(places[starts])  # chunks in the order of their first rows
        self._starts, self._ends = starts[by_first], ends[by_first]

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, place: int) -> MicroBatch:
        rows = self._rows[self._starts[place] : self._ends[place]]
        return MicroBatch(
            rows=tuple(rows.tolist()),
            visit=self._epoch,
            drop_caption=tuple(self._drop_caption[rows].tolist()),
            drop_references=bool(self._without_references[self._groups[rows[0]]]),
        )
