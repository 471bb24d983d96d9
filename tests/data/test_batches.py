"""The order of batches as properties: complete, pure, blind to the number of processes."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_image_finetune.data.batches import Batches, MicroBatch

Geometry = tuple[int, ...]
quick = settings(max_examples=60, deadline=None)


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Rows of a few geometries (target, references...), some without references."""
    geometries = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), min_size=1, max_size=40))
    rates = st.sampled_from([0.0, 0.3, 1.0])
    return {
        "geometries": geometries,
        "batch_size": draw(st.integers(1, 5)),
        "micro_batches_per_step": draw(st.integers(1, 7)),
        "seed": draw(st.integers(0, 2**32)),
        "shuffle": draw(st.booleans()),
        "caption_dropout_rate": draw(rates),
        "reference_dropout_rate": draw(rates),
        "repeats": draw(st.none() | st.lists(st.integers(1, 3), min_size=len(geometries), max_size=len(geometries))),
    }


def make(rows: int = 100, **changed: Any) -> Batches:
    given_arguments = {
        "geometries": [(row % 3, 0) for row in range(rows)],
        "batch_size": 4,
        "micro_batches_per_step": 2,
        "seed": 0,
        "shuffle": True,
        "caption_dropout_rate": 0.0,
        "reference_dropout_rate": 0.0,
    }
    return Batches(**(given_arguments | changed))


@quick
@given(arguments(), st.integers(0, 5))
def test_every_row_once_an_epoch_and_one_geometry_a_batch(given_arguments: dict[str, Any], epoch: int) -> None:
    batches = Batches(**given_arguments).epoch(epoch)
    geometries = given_arguments["geometries"]
    repeats = given_arguments["repeats"] or [1] * len(geometries)
    seen = sorted(pair for batch in batches for pair in zip(batch.rows, batch.visits, strict=True))
    # Row 4 with repeats 3 has in epoch 2 its visits 6, 7 and 8: no visit comes twice in a run, none is passed over.
    assert seen == [(row, epoch * times + each) for row, times in enumerate(repeats) for each in range(times)]
    for batch in batches:
        assert len({geometries[row] for row in batch.rows}) == 1
        assert 1 <= len(batch.rows) == len(batch.drop_caption) <= given_arguments["batch_size"]
    # No more batches than the geometries force, whatever is dropped.
    kinds = Counter(kind for kind, times in zip(geometries, repeats, strict=True) for _ in range(times))
    assert len(batches) == sum(math.ceil(rows / given_arguments["batch_size"]) for rows in kinds.values())


@quick
@given(arguments(), st.integers(0, 5))
def test_batches_follow_one_permutation(given_arguments: dict[str, Any], epoch: int) -> None:
    """A slow second reading of the rule, from the permutation that batches of one row show."""
    alone = Batches(**(given_arguments | {"batch_size": 1})).epoch(epoch)
    chunks: list[list[int]] = []
    current: dict[Any, list[int]] = {}
    for batch in alone:
        (row,) = batch.rows
        kind = given_arguments["geometries"][row]
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
    if not given_arguments["shuffle"]:
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
    batches = make(rows=10, geometries=[0] * 10, batch_size=10)
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
    from qwen_image_finetune.data import batches as module

    made: list[int] = []
    original = module._Epoch.__init__

    def counted(self: Any, epoch: int, *rest: Any) -> None:
        made.append(epoch)
        original(self, epoch, *rest)

    monkeypatch.setattr(module._Epoch, "__init__", counted)
    batches = make(reference_dropout_rate=0.3)
    batches.at(2000)
    assert len(made) <= 2
    assert batches.epoch_of(2000) == made[0] > 100


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_step_sees_as_many_samples_whatever_is_dropped(rate: float) -> None:
    """20 pairs in batches of 2, 4 of them a step: 10 epochs are 25 steps of 8 samples."""
    batches = make(geometries=[0] * 20, batch_size=2, micro_batches_per_step=4, reference_dropout_rate=rate)
    assert batches.steps(10) == 25
    assert {sum(len(batch.rows) for batch in batches.at(step)) for step in range(25)} == {8}


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        make(geometries=[])
