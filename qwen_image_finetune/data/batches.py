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
    visits: tuple[int, ...]  # per row: how often it was seen before
    drop_caption: tuple[bool, ...]  # per row: train on the empty prompt
    drop_references: bool  # train without the references


class Batches:
    """Which rows each optimizer step trains on.

    Every epoch visits every row once, or as often as it is repeated, in as many micro-batches as every other epoch.
    Epochs follow each other in one stream of micro-batches, and an optimizer step takes the next
    `micro_batches_per_step` of them, so that a step may begin in one epoch and end in the next.
    """

    def __init__(
        self,
        geometries: Sequence[Hashable],
        *,
        batch_size: int,
        micro_batches_per_step: int,
        seed: int,
        shuffle: bool,
        caption_dropout_rate: float,
        reference_dropout_rate: float,
        repeats: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            geometries: of each row; rows with equal ones can share a batch, with and without their references.
            batch_size: rows of a micro-batch; fewer where a geometry runs out.
            micro_batches_per_step: gradient accumulation times processes.
            shuffle: a new order every epoch; otherwise rows keep their order, as far as geometries allow.
            repeats: visits to each row in an epoch; one by default. Each is one more place in the order.
            caption_dropout_rate: share of visits to a row with the empty prompt.
            reference_dropout_rate: share of visits without references, independent of the former. Rows of a micro-batch
                lose them together: drawn one by one, they would fall apart into smaller batches.

        Raises:
            ValueError: no rows.
        """
        if not len(geometries):
            raise ValueError("no rows to make batches of")
        numbers: dict[Hashable, int] = {}
        groups = [numbers.setdefault(geometry, len(numbers)) for geometry in geometries]
        times = [1] * len(groups) if repeats is None else repeats
        self._repeats: NDArray[np.int32] = np.array(times, dtype=np.int32)  # (rows,)
        # Of each visit of an epoch its row, and the group of that.
        self._rows: NDArray[np.int32] = np.repeat(np.arange(len(groups), dtype=np.int32), self._repeats)
        self._groups: NDArray[np.int32] = np.array(groups, dtype=np.int32)[self._rows]
        self._length = int((-(-np.bincount(self._groups) // batch_size)).sum())  # micro-batches of an epoch
        self._batch_size = batch_size
        self._per_step = micro_batches_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._caption_rate = caption_dropout_rate
        self._reference_rate = reference_dropout_rate
        self._recent: dict[int, _Epoch] = {}

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """All micro-batches of an epoch (0-based)."""
        order = self._order(epoch)
        return [order.batch(place) for place in range(self._length)]

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step (0-based), of all processes."""
        first = step * self._per_step
        places = (divmod(place, self._length) for place in range(first, first + self._per_step))
        return [self._order(epoch).batch(place) for epoch, place in places]

    def steps(self, epochs: int) -> int:
        """Optimizer steps until that many epochs are over; the last one may reach into the next epoch."""
        return -(-epochs * self._length // self._per_step)

    def epoch_of(self, step: int) -> int:
        """The epoch in which the first micro-batch of a step lies."""
        return step * self._per_step // self._length

    def _order(self, epoch: int) -> _Epoch:
        if epoch not in self._recent:
            if len(self._recent) > 1:  # a step that straddles needs two
                del self._recent[max(self._recent, key=lambda kept: abs(kept - epoch))]
            self._recent[epoch] = self._draw(epoch)
        return self._recent[epoch]

    def _draw(self, epoch: int) -> _Epoch:
        generator = np.random.Generator(np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)))
        visits = len(self._groups)
        drop_caption = np.asarray(generator.random(visits) < self._caption_rate)
        drop_references = np.asarray(generator.random(visits) < self._reference_rate)
        order = generator.permutation(visits) if self._shuffle else np.arange(visits)
        return _Epoch(
            epoch, order, self._groups, self._rows, self._repeats, drop_caption, drop_references, self._batch_size
        )


class _Epoch:
    """One epoch in arrays; its micro-batches are made when asked for."""

    def __init__(
        self,
        epoch: int,
        order: NDArray[np.int64],
        groups: NDArray[np.int32],
        rows: NDArray[np.int32],
        repeats: NDArray[np.int32],
        drop_caption: NDArray[np.bool_],
        drop_references: NDArray[np.bool_],
        batch_size: int,
    ) -> None:
        """
        Args:
            order: the visits of the epoch, permuted.
            groups: of each visit, that of its row.
            rows: of each visit.
            repeats: visits to each row.
        """
        self._rows = rows
        # What makes of the number of a visit in the epoch that of its row's visits before: (rows,)
        self._earlier = epoch * repeats.astype(np.int64) - (np.cumsum(repeats, dtype=np.int64) - repeats)
        self._drop_caption, self._drop_references = drop_caption, drop_references
        # Visits group after group, each group in the order of the permutation.
        places = np.argsort(groups[order], kind="stable")  # (visits,) places in the permutation
        self._visits = order[places]
        sorted_groups = groups[self._visits]
        begins = np.flatnonzero(np.diff(sorted_groups, prepend=-1))  # where a group begins
        sizes = np.diff(begins, append=len(order))
        within = np.arange(len(order)) - np.repeat(begins, sizes)
        starts = np.flatnonzero(within % batch_size == 0)  # where a chunk begins
        ends = np.append(starts[1:], len(order))
        by_first = np.argsort(places[starts])  # chunks in the order of their first rows
        self._starts, self._ends = starts[by_first], ends[by_first]

    def batch(self, place: int) -> MicroBatch:
        visits = self._visits[self._starts[place] : self._ends[place]]
        rows = self._rows[visits]
        return MicroBatch(
            rows=tuple(rows.tolist()),
            visits=tuple((visits + self._earlier[rows]).tolist()),
            drop_caption=tuple(self._drop_caption[visits].tolist()),
            drop_references=bool(self._drop_references[visits[0]]),
        )
