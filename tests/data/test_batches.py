"""The order of batches as properties: complete, pure, blind to the number of processes."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_finetune.data.batches import Batches, MicroBatch, Share, allotted

Geometry = tuple[int, ...]
quick = settings(max_examples=60, deadline=None)


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Rows of a few geometries (target, references...), some of several, in one to three data sets."""
    geometry = st.lists(st.integers(0, 2), min_size=1, max_size=2).map(tuple)
    turns = st.lists(geometry, min_size=1, max_size=draw(st.sampled_from([1, 3]))).map(tuple)
    geometries = draw(st.lists(turns, min_size=1, max_size=30))
    rates = st.sampled_from([0.0, 0.3, 1.0])
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(geometries) - 1)), max_size=2)) - {len(geometries)})
    ends = [0, *cuts, len(geometries)]
    weighed = draw(st.booleans())
    shares = [
        Share(range(start, end), draw(st.integers(1, 3)), draw(st.sampled_from([0.2, 1.0, 3.0])) if weighed else None)
        for start, end in itertools.pairwise(ends)
    ]
    return {
        "geometries": geometries,
        "batch_size": draw(st.integers(1, 5)),
        "micro_batches_per_step": draw(st.integers(1, 7)),
        "seed": draw(st.integers(0, 2**32)),
        "shuffle": draw(st.booleans()),
        "caption_dropout_rate": draw(rates),
        "reference_dropout_rate": draw(rates),
        "shares": draw(st.none() | st.just(shares)),
    }


def make(rows: int = 100, **changed: Any) -> Batches:
    given_arguments = {
        "geometries": [((row % 3, 0),) for row in range(rows)],
        "batch_size": 4,
        "micro_batches_per_step": 2,
        "seed": 0,
        "shuffle": True,
        "caption_dropout_rate": 0.0,
        "reference_dropout_rate": 0.0,
    }
    return Batches(**(given_arguments | changed))


def seen_in(batches: Batches, epochs: int) -> list[list[tuple[int, int]]]:
    """Of each epoch, (row, its visits before) of every visit."""
    return [
        sorted(pair for batch in batches.epoch(each) for pair in zip(batch.rows, batch.visits, strict=True))
        for each in range(epochs)
    ]


@quick
@given(arguments(), st.integers(0, 5))
def test_every_row_in_turn_and_one_geometry_a_batch(given_arguments: dict[str, Any], epoch: int) -> None:
    """A set is passed through again and again: no row is seen twice more than another, no visit comes twice."""
    batches, geometries = Batches(**given_arguments), given_arguments["geometries"]
    shares = given_arguments["shares"] or [Share(range(len(geometries)))]
    epochs = seen_in(batches, epoch + 1)
    visits = Counter(row for each in epochs for row, _ in each)
    assert sorted(pair for each in epochs for pair in each) == [
        (row, n) for row in sorted(visits) for n in range(visits[row])
    ]
    for share, count in zip(shares, allotted(shares), strict=True):
        assert all(sum(row in share.rows for row, _ in each) == count for each in epochs)
        counts = [visits[row] for row in share.rows]
        assert max(counts) - min(counts) <= 1
        if share.weight is None:
            assert count == share.repeats * len(share.rows) and len(set(counts)) == 1
    assert batches.visits == len(epochs[0])
    for batch in batches.epoch(epoch):
        kinds = {geometries[row][visit % len(geometries[row])]
                 for row, visit in zip(batch.rows, batch.visits, strict=True)}  # fmt: skip
        assert len(kinds) == 1
        assert 1 <= len(batch.rows) == len(batch.drop_caption) <= given_arguments["batch_size"]
    # No more batches than the geometries force, whatever is dropped.
    forced = Counter(geometries[row][visit % len(geometries[row])] for row, visit in epochs[epoch])
    assert len(batches.epoch(epoch)) == sum(math.ceil(rows / given_arguments["batch_size"]) for rows in forced.values())


def test_weights_are_shares_of_the_visits() -> None:
    """3 to 1, of 8 and 32 rows: 30 and 10 visits of an epoch, and rows of the first are seen 3 or 4 times in it."""
    shares = [Share(range(8), weight=3), Share(range(8, 40), weight=1)]
    assert allotted(shares) == [30, 10]
    assert allotted([Share(range(3), weight=1e-6), Share(range(97), weight=1)]) == [1, 99]
    assert allotted([Share(range(5), weight=1), Share(range(5), weight=1), Share(range(1), weight=1)]) == [4, 4, 3]
    assert allotted([Share(range(5), repeats=2), Share(range(7))]) == [10, 7]
    batches = make(rows=40, shares=shares)
    times = Counter(row for row, _ in seen_in(batches, 1)[0])
    assert {times[row] for row in range(8)} == {3, 4}
    # After 16 epochs every row of a set was seen as often: 16 * 30 / 8 times, and 16 * 10 / 32.
    all_times = Counter(row for each in seen_in(batches, 16) for row, _ in each)
    assert [all_times[row] for row in range(40)] == [60] * 8 + [5] * 32
    # Which rows an epoch has is drawn: those that come early in one pass are not the early ones of the next.
    early = [{row for row, _ in each if row >= 8} for each in seen_in(batches, 16)]
    assert len({frozenset(rows) for rows in early}) > 8
    assert seen_in(batches, 3) != seen_in(make(rows=40, shares=shares, seed=1), 3)


def test_dropouts_of_rows() -> None:
    """Each row has its own; rows that lose their references at other rates share no batch."""
    rates = [0.0, 1.0] * 30
    batches = make(rows=60, geometries=[((0,),)] * 60, caption_dropout_rate=rates, reference_dropout_rate=rates)
    for batch in batches.epoch(0):
        assert batch.drop_caption == tuple(rates[row] == 1 for row in batch.rows)
        assert {rates[row] for row in batch.rows} == {float(batch.drop_references)}
    assert len(batches.epoch(0)) == 2 * math.ceil(30 / 4)


@quick
@given(arguments(), st.integers(0, 5))
def test_batches_follow_one_permutation(given_arguments: dict[str, Any], epoch: int) -> None:
    """A slow second reading of the rule, from the permutation that batches of one row show."""
    alone = Batches(**(given_arguments | {"batch_size": 1})).epoch(epoch)
    chunks: list[list[int]] = []
    current: dict[Any, list[int]] = {}
    for batch in alone:
        (row,), (visit,) = batch.rows, batch.visits
        own = given_arguments["geometries"][row]
        kind = own[visit % len(own)]
        if len(current.get(kind, ())) in (0, given_arguments["batch_size"]):
            current[kind] = []
            chunks.append(current[kind])
        current[kind].append(row)
    together = Batches(**given_arguments).epoch(epoch)
    assert [list(batch.rows) for batch in together] == chunks
    captions = {(batch.rows[0], batch.visits[0]): batch.drop_caption[0] for batch in alone}
    references = {(batch.rows[0], batch.visits[0]): batch.drop_references for batch in alone}
    assert all(batch.drop_references == references[batch.rows[0], batch.visits[0]] for batch in together)
    assert all(
        captions[row, visit] == drop
        for batch in together
        for row, visit, drop in zip(batch.rows, batch.visits, batch.drop_caption, strict=True)
    )
    if not given_arguments["shuffle"] and not given_arguments["shares"]:
        assert [batch.rows + batch.visits for batch in alone] == sorted(captions)


@quick
@given(arguments(), st.integers(0, 4), st.integers(0, 60))
def test_steps_cut_one_stream(given_arguments: dict[str, Any], epochs: int, step: int) -> None:
    batches = Batches(**given_arguments)
    per_step = given_arguments["micro_batches_per_step"]
    stream: list[MicroBatch] = []
    epoch_of: list[int] = []
    epoch = 0
    while len(stream) < (step + 1) * per_step or epoch < epochs:
        stream += batches.epoch(epoch)
        epoch_of += [epoch] * (len(stream) - len(epoch_of))
        epoch += 1
    expected = stream[step * per_step : (step + 1) * per_step]
    fresh = Batches(**given_arguments)
    assert fresh.at(step) == expected  # asked first, and asked after others
    assert batches.at(step) == expected
    assert pickle.loads(pickle.dumps(batches)).at(step) == expected
    assert fresh.epoch_of(step) == epoch_of[step * per_step]
    whole_epochs = sum(len(batches.epoch(each)) for each in range(epochs))
    assert fresh.steps(epochs) == math.ceil(whole_epochs / per_step)


@quick
@given(arguments(), st.integers(1, 4), st.integers(1, 4))
def test_accumulation_and_processes_share_one_stream(
    given_arguments: dict[str, Any], accumulation: int, processes: int
) -> None:
    """A step of (2 accumulated, 1 process) is a step of (1, 2 processes); halving it gives twice the steps."""
    whole = Batches(**(given_arguments | {"micro_batches_per_step": accumulation * processes}))
    single = Batches(**(given_arguments | {"micro_batches_per_step": 1}))
    for step in range(6):
        parts = [single.at(step * accumulation * processes + part)[0] for part in range(accumulation * processes)]
        assert whole.at(step) == parts


def test_order_changes_with_seed_and_epoch() -> None:
    batches = make()
    assert batches.epoch(0) == make().epoch(0)
    assert batches.epoch(0) != make(seed=1).epoch(0)
    assert [batch.rows for batch in batches.epoch(0)] != [batch.rows for batch in batches.epoch(1)]
    assert [batch.rows for batch in make(shuffle=False).epoch(0)] == [
        batch.rows for batch in make(shuffle=False).epoch(1)
    ]


def test_orders_are_uniform() -> None:
    """Every row is as often first as any other: chi-square with 9 degrees of freedom, p = 1e-4 at 33.7."""
    batches = make(rows=10, geometries=[(0,)] * 10, batch_size=10)
    firsts = np.bincount([batches.epoch(epoch)[0].rows[0] for epoch in range(1000)], minlength=10)
    assert ((firsts - 100) ** 2 / 100).sum() < 33.7


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_shares_of_dropouts(rate: float) -> None:
    """5 standard deviations of 20,000 independent draws, and no correlation between the two drops.

    Rows of a batch lose their references together, so that there are fewer draws in batches of four.
    """
    epoch = make(rows=20_000, caption_dropout_rate=rate, reference_dropout_rate=rate).epoch(3)
    captions = np.array([drop for batch in epoch for drop in batch.drop_caption])
    references = np.array([batch.drop_references for batch in epoch for _ in batch.rows])
    tolerance = 5 * math.sqrt(rate * (1 - rate) / 20_000)
    assert abs(captions.mean() - rate) <= tolerance
    assert abs(references.mean() - rate) <= 2 * tolerance
    assert abs((captions & references).mean() - rate**2) <= 4 * tolerance


def test_drops_differ_between_epochs_and_do_not_depend_on_each_other() -> None:
    def dropped(batches: Batches, epoch: int) -> set[int]:
        return {
            row
            for batch in batches.epoch(epoch)
            for row, drop in zip(batch.rows, batch.drop_caption, strict=True)
            if drop
        }

    batches = make(caption_dropout_rate=0.5)
    assert dropped(batches, 0) != dropped(batches, 1)
    assert dropped(batches, 0) == dropped(make(caption_dropout_rate=0.5, reference_dropout_rate=0.5), 0)
    assert dropped(batches, 0) == dropped(make(caption_dropout_rate=0.5, batch_size=1, shuffle=False), 0)


def test_a_far_step_needs_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the epochs of the step are put in order."""
    made: list[int] = []
    original = Batches._draw

    def counted(self: Batches, epoch: int) -> Any:
        made.append(epoch)
        return original(self, epoch)

    monkeypatch.setattr(Batches, "_draw", counted)
    batches = make(reference_dropout_rate=0.3)
    batches.at(2000)
    assert len(made) <= 2
    assert batches.epoch_of(2000) == made[0] > 100


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_step_sees_as_many_samples_whatever_is_dropped(rate: float) -> None:
    """20 pairs in batches of 2, 4 of them a step: 10 epochs are 25 steps of 8 samples."""
    batches = make(geometries=[(0,)] * 20, batch_size=2, micro_batches_per_step=4, reference_dropout_rate=rate)
    assert batches.steps(10) == 25
    assert {sum(len(batch.rows) for batch in batches.at(step)) for step in range(25)} == {8}


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        make(geometries=[])
