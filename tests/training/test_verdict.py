"""What is said about held-out losses: intervals against scipy, warnings where they are due, and the best checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from qwen_image_finetune.disk import history, runs
from qwen_image_finetune.judging.intervals import bootstrap, t_interval, t_quantile
from qwen_image_finetune.training.verdict import Best, Measured, constant, verdict


@pytest.mark.parametrize("degrees", [1, 2, 7, 30, 31, 40, 100, 5000])
def test_quantiles_are_those_of_scipy(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)


def test_the_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).normal(1, 2, 12).tolist()
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, low, high = t_interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-3)
    assert t_interval([3.0]) == (3.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_the_bootstrap_is_that_of_scipy_and_always_the_same() -> None:
    values = np.random.default_rng(1).exponential(1, 60).tolist()
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=0).confidence_interval
    mean, low, high = bootstrap(values)
    assert (mean, low, high) == bootstrap(values)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03)


def words(*measured: Measured | None) -> list[str]:
    now, base, last, best = measured
    assert now is not None
    return list(verdict(now, base, last, best))


BASE = Measured(0, [1.0, 1.2, 0.8, 1.1])


def test_an_improvement_is_one_sentence_with_its_interval() -> None:
    now = Measured(20, [0.9, 1.0, 0.75, 0.95])
    mean, low, high = t_interval([-0.1, -0.2, -0.05, -0.15])
    expected = f"step 20: loss 0.9000 on 4 held-out pairs, {mean:+.4f} (95 %: {low:+.4f} to {high:+.4f})"
    assert words(now, BASE, None, None) == [f"{expected} from the base's 1.0250"]


def test_what_is_wrong_is_said() -> None:
    collapsed = Measured(20, [loss + 1 for loss in BASE.losses])
    assert "2.0 times the base's" in words(collapsed, BASE, None, None)[1]
    jumped = Measured(30, [loss * 1.7 for loss in BASE.losses])
    assert "1.7 times that of the round before" in words(jumped, None, BASE, None)[1]
    overfitted = Measured(40, [loss * 1.1 for loss in BASE.losses])
    assert "the checkpoint of step 0 is the better one" in words(overfitted, None, BASE, BASE)[1]
    assert "not finite" in words(Measured(50, [math.nan, 1.0, 1.0, 1.0]), BASE, None, None)[1]
    one_of_four = Measured(60, [1.0, 1.2, 0.8, 9.0])  # three times the mean, but one pair decides nothing
    assert len(words(one_of_four, BASE, BASE, BASE)) == 1


def test_one_colour_is_noticed_where_the_truth_has_many() -> None:
    flat, varied = Image.new("RGB", (16, 16), (200, 30, 30)), Image.effect_noise((16, 16), 60).convert("RGB")
    assert constant(5, [flat, varied], [varied, varied]) is not None
    assert constant(5, [flat, varied], [flat, varied]) is None
    nearly = Image.effect_noise((16, 16), 2).convert("RGB")
    assert "1 of 1 samples of step 5" in str(constant(5, [nearly], [varied]))


def test_the_best_saved_one_is_pointed_to_and_outlives_the_limit(tmp_path: Path) -> None:
    import hashlib

    run = runs.claim_version(tmp_path)

    def saved(step: int) -> Path:
        from qwen_image_finetune.disk import checkpoint

        folder = run.checkpoint_path(0, step)
        writer = checkpoint.CheckpointWriter()
        writer.submit(folder, lambda staged: (staged / "weights").write_bytes(hashlib.md5(str(step).encode()).digest()),
                      lambda: runs.retention(run, 1), needed=16)  # fmt: skip
        writer.wait()
        return folder

    best = Best(run)
    best.offer(Measured(1, [0.5, 0.5]), None, saved(1))
    best.offer(Measured(2, [0.4, 0.3]), None, saved(2))
    best.offer(Measured(3, [0.1, 0.1]), None, None)  # not saved
    best.offer(Measured(4, [0.6, 0.6]), None, saved(4))
    best.offer(Measured(5, [math.nan, 0.1]), None, saved(5))  # a run that has collapsed
    assert json.loads((run.path / history.BEST).read_text())["checkpoint"] == "checkpoint-0-2"
    assert history.best_checkpoint(run.path) == run.checkpoint_path(0, 2)
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-0-2", "checkpoint-0-5"]
    assert Best(run).measured == Measured(2, [0.4, 0.3])
    run.rewind(1)
    assert history.best_checkpoint(run.path) is None and Best(run).measured is None
    run.close()
