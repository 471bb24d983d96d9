"""The order of batches: a function of the seed and the step, whatever the number of processes. Needs numpy alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one geometry that go through the model together, in one process."""

    rows: tuple[int, ...]
    visits: tuple[int, ...]  # per row: how often it was seen before
    drop_caption: tuple[bool, ...]  # per row: train on the empty prompt
    drop_references: bool  # train without the references
    strata: tuple[tuple[int, int], ...] | None = None  # per row: which of how many parts of the noise levels it gets


def stratified(micros: Sequence[MicroBatch], seed: int, step: int) -> list[MicroBatch]:
    """The micro-batches of a step, of all processes, each of whose n rows gets another n-th of the noise levels.

    Which one is drawn, so that over many steps every row meets all of them.
    """
    number = sum(len(micro.rows) for micro in micros)
    key = np.array([seed, (1 << 63) + step], dtype=np.uint64)  # no key of an epoch or of a pass
    parts = iter(np.random.Generator(np.random.Philox(key=key)).permutation(number).tolist())
    return [replace(micro, strata=tuple((next(parts), number) for _ in micro.rows)) for micro in micros]


class Share(NamedTuple):
    """The rows of one data set, and how often they are visited."""

    rows: Sequence[int]
    repeats: int = 1  # visits to each in an epoch; without effect beside a weight
    weight: float | None = None  # share of all visits, beside the other weights


def allotted(shares: Sequence[Share]) -> list[int]:
    """Visits of an epoch to each data set.

    Weights divide as many visits as there are rows, by largest remainders; every set has one at least.
    """
    if any(share.weight is None for share in shares):
        return [len(share.rows) * share.repeats for share in shares]
    weights = [Fraction(share.weight or 0) for share in shares]
    total = sum(len(share.rows) for share in shares)
    exact = [total * weight / sum(weights) for weight in weights]
    visits = [max(1, floor(wanted)) for wanted in exact]
    by_remainder = sorted(range(len(shares)), key=lambda place: floor(exact[place]) - exact[place])
    for place in by_remainder[: max(0, total - sum(visits))]:
        visits[place] += 1
    return visits


class Batches:
    """Which rows each optimizer step trains on.

    Every data set is passed through again and again, each pass in an order of its own, and an epoch takes the next
    visits of every set, as many of each as of every other epoch: without weights whole passes, so that it visits every
    row once, or as often as it is repeated. Epochs follow each other in one stream of micro-batches, and an optimizer
    step takes the next `micro_batches_per_step` of them, so that a step may begin in one epoch and end in the next.
    """

    def __init__(
        self,
        geometries: Sequence[Sequence[Hashable]],
        *,
        batch_size: int,
        micro_batches_per_step: int,
        seed: int,
        shuffle: bool,
        caption_dropout_rate: float | Sequence[float],
        reference_dropout_rate: float | Sequence[float],
        shares: Sequence[Share] | None = None,
    ) -> None:
        """
        Args:
            geometries: of each row those that its visits take turns at; rows whose visits have equal ones can share a
                batch, with and without their references.
            batch_size: rows of a micro-batch; fewer where a geometry runs out.
            micro_batches_per_step: gradient accumulation times processes.
            shuffle: a new order every epoch; otherwise rows keep their order, as far as geometries allow.
            caption_dropout_rate: share of visits with the empty prompt, of all rows or of each.
            reference_dropout_rate: share of visits without references, independent of the former. Rows of a micro-batch
                lose them together: drawn one by one, they would fall apart into smaller batches. So rows with other
                shares are not in one batch.
            shares: the data sets; by default all rows are of one.

        Raises:
            ValueError: no rows.
        """
        if not len(geometries):
            raise ValueError("no rows to make batches of")
        rows = len(geometries)
        self._caption_rate, self._reference_rate = (
            np.broadcast_to(np.asarray(rate, dtype=np.float64), rows)
            for rate in (caption_dropout_rate, reference_dropout_rate)
        )
        numbers: dict[Hashable, int] = {}
        # Of each row and turn the number of its geometry, row after row; and where those of a row begin.
        self._groups: NDArray[np.int32] = np.array(
            [
                numbers.setdefault((geometry, rate), len(numbers))
                for own, rate in zip(geometries, self._reference_rate.tolist(), strict=True)
                for geometry in own
            ],
            dtype=np.int32,
        )
        self._turns: NDArray[np.int64] = np.array([len(own) for own in geometries], dtype=np.int64)
        self._first: NDArray[np.int64] = np.cumsum(self._turns) - self._turns
        self._shares = [Share(range(rows))] if shares is None else shares
        self._members = [np.asarray(share.rows, dtype=np.int64) for share in self._shares]
        self._allotted = allotted(self._shares)
        self._batch_size = batch_size
        self._per_step = micro_batches_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._recent: dict[int, _Epoch] = {}
        # Epochs that visit the same rows at the same turns have as many micro-batches; others are counted one by one.
        whole = all(visits % len(share.rows) == 0 for visits, share in zip(self._allotted, self._shares, strict=True))
        self._length = self._count(0) if whole and int(self._turns.max()) == 1 else None
        self._ends: list[int] = []  # micro-batches until the end of each epoch, as far as they were counted

    @property
    def visits(self) -> int:
        """Visits of an epoch."""
        return sum(self._allotted)

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """All micro-batches of an epoch (0-based)."""
        order = self._order(epoch)
        return [order.batch(place) for place in range(self._start(epoch + 1) - self._start(epoch))]

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step (0-based), of all processes."""
        first = step * self._per_step
        places = (self._place(place) for place in range(first, first + self._per_step))
        return [self._order(epoch).batch(place) for epoch, place in places]

    def steps(self, epochs: int) -> int:
        """Optimizer steps until that many epochs are over; the last one may reach into the next epoch."""
        return -(-self._start(epochs) // self._per_step)

    def epoch_of(self, step: int) -> int:
        """The epoch in which the first micro-batch of a step lies."""
        return self._place(step * self._per_step)[0]

    def _start(self, epoch: int) -> int:
        """Micro-batches before an epoch."""
        if self._length is not None:
            return epoch * self._length
        while len(self._ends) < epoch:
            self._ends.append(self._start(len(self._ends)) + self._count(len(self._ends)))
        return self._ends[epoch - 1] if epoch else 0

    def _place(self, number: int) -> tuple[int, int]:
        """(epoch, place in it) of a micro-batch of the whole stream."""
        if self._length is not None:
            return divmod(number, self._length)
        while not self._ends or self._ends[-1] <= number:
            self._start(len(self._ends) + 1)
        epoch = bisect_right(self._ends, number)
        return epoch, number - self._start(epoch)

    def _count(self, epoch: int) -> int:
        """Micro-batches of an epoch."""
        return int((-(-np.bincount(self._group_of(*self._visited(epoch))) // self._batch_size)).sum())

    def _visited(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each visit of an epoch its row, and how often that was seen before; set after set, pass after pass."""
        rows, visits = [], []
        for number, (members, count) in enumerate(zip(self._members, self._allotted, strict=True)):
            passes, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64), len(members))
            visits.append(passes)
            if self._shuffle and count % len(members):  # a part of a pass: which part, its own order says
                orders = {one: self._generator(number + 1, one).permutation(len(members)) for one in np.unique(passes)}
                places = np.concatenate([orders[one][places[passes == one]] for one in orders])
            rows.append(members[places])
        return np.concatenate(rows), np.concatenate(visits)

    def _group_of(self, rows: NDArray[np.int64], visits: NDArray[np.int64]) -> NDArray[np.int32]:
        return self._groups[self._first[rows] + visits % self._turns[rows]]

    def _generator(self, word: int, number: int) -> np.random.Generator:
        """Of an epoch (word 0), or of a pass through the set of that number, from 1."""
        key = np.array([self._seed, (word << 40) + number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _order(self, epoch: int) -> _Epoch:
        if epoch not in self._recent:
            if len(self._recent) > 1:  # a step that straddles needs two
                del self._recent[max(self._recent, key=lambda kept: abs(kept - epoch))]
            self._recent[epoch] = self._draw(epoch)
        return self._recent[epoch]

    def _draw(self, epoch: int) -> _Epoch:
        generator = self._generator(0, epoch)
        rows, visits = self._visited(epoch)
        drop_caption = np.asarray(generator.random(len(rows)) < self._caption_rate[rows])
        drop_references = np.asarray(generator.random(len(rows)) < self._reference_rate[rows])
        order = generator.permutation(len(rows)) if self._shuffle else np.arange(len(rows))
        groups = self._group_of(rows, visits)
        return _Epoch(order, groups, rows, visits, drop_caption, drop_references, self._batch_size)


class _Epoch:
    """One epoch in arrays; its micro-batches are made when asked for."""

    def __init__(
        self,
        order: NDArray[np.int64],
        groups: NDArray[np.int32],
        rows: NDArray[np.int64],
        before: NDArray[np.int64],
        drop_caption: NDArray[np.bool_],
        drop_references: NDArray[np.bool_],
        batch_size: int,
    ) -> None:
        """
        Args:
            order: the visits of the epoch, permuted.
            groups: of each visit, that of its row's geometry.
            rows: of each visit.
            before: of each visit, how often its row was seen before.
        """
        self._rows, self._before = rows, before
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
        return MicroBatch(
            rows=tuple(self._rows[visits].tolist()),
            visits=tuple(self._before[visits].tolist()),
            drop_caption=tuple(self._drop_caption[visits].tolist()),
            drop_references=bool(self._drop_references[visits[0]]),
        )
