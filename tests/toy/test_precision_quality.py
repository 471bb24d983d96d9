"""Quality by precision: the share that is kept, by hand, and rows that differ in nothing but precision and seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_image_finetune.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import precision_quality

    return precision_quality


def test_kept_is_the_share_of_the_reduction(script: Any) -> None:
    reference = script.Measured("bf16", [1.0, 3.0], [0.5, 1.5], None)  # 1.0 is taken away in the mean
    row = script.Measured("nf4", [1.2, 3.2], [0.7, 1.5], None)  # 0.1 of it is not
    share = script.kept(row, reference)
    assert share.mean == pytest.approx(0.9)
    assert share.low == pytest.approx(0.9 - 12.706 * 0.1)  # Student's t of one degree of freedom, shares 0.8 and 1.0
    assert share.high == pytest.approx(0.9 + 12.706 * 0.1)
    assert script.kept(reference, reference) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="train longer"):
        script.kept(row, script.Measured("bf16", [1.0, 1.0], [1.0, 1.1], None))


def test_rows_differ_in_precision_and_seed_alone(
    script: Any, configure: Callable[..., Config], write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    configure("QwenImageEdit")
    held_out = write_pairs(tmp_path / "held_out", [(64, 64), (96, 96), (64, 64)], seed=5)
    overrides = [f"validation.dataset_path={held_out}"]

    def measure(row: str) -> Any:
        return script.measure(tmp_path / "config.yaml", row, 3, tmp_path, overrides, draws=False)

    reference, again, other, quantised = (measure(row) for row in ("bf16", "bf16", script.OTHER_SEED, "fp4"))
    assert len(reference.before) == len(reference.after) == 3
    assert (again.before, again.after) == (reference.before, reference.after)
    assert other.before == reference.before and other.after != reference.after
    assert quantised.before != reference.before
    assert quantised.before == pytest.approx(reference.before, rel=0.05)
    lines = list(script.table([reference, other, quantised]))
    assert len(lines) == 4
    assert "100 %" in lines[1] and lines[2].startswith(script.OTHER_SEED) and "%" in lines[3]
