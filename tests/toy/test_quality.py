"""scripts/quality.py: what is known is not measured again, and its pages say what its file says. Nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import quality

    return quality


def test_what_is_known_is_not_measured_again(quality: Any, tmp_path: Path) -> None:
    base, (ours, other, *_) = "flux_kontext", quality.ROWS
    everything = quality.tasks([ours, other], [base], (1, 2), 400)
    assert [(row.name, seed, steps) for _, row, seed, steps in everything[:4]] == [
        (row.name, seed, 200) for seed in (1, 2) for row in (ours, other)
    ]
    study, left = quality.Study(tmp_path / "known.json"), []
    for number, task in enumerate(study.due(everything)):
        if number == 3:  # cut off
            break
        study.note(*task, {"iou": 0.5, "loss": 1.0})
    study = quality.Study(tmp_path / "known.json")
    left = list(study.due(everything))
    assert left == everything[3:]
    study.written["runs"][base][ours.name]["settings"] = ["train.sigma_shift=2"]  # which it had, once
    assert list(study.due(everything)) == [task for task in everything if task[1] is ours or task in left]
    study.note(base, ours, 1, 100, {"iou": 0.4, "loss": 1.0})
    assert study.marks(base, ours, 1) == {"100": {"iou": 0.4, "loss": 1.0}}, "what was of other settings is gone"


def test_every_row_is_a_configuration(quality: Any) -> None:
    assert len({row.folder for row in quality.ROWS}) == len(quality.ROWS)
    for row in quality.ROWS[1:]:
        for base in row.by_base or list(quality.BASES)[:1]:
            assert row.of(base)
            config = quality.settings(base, row, 42, 200)
            assert config.lr_scheduler.scheduler_type == "constant", "or 200 steps are not the first half of 400"


def test_tables_by_hand(quality: Any) -> None:
    page, base, (ours, other, *_) = quality.quality_page, "flux_kontext", quality.ROWS

    def seeds(*values: float) -> dict[str, Any]:
        return {
            str(seed): {"100": {"iou": 0.6, "loss": 1.0}, "200": {"iou": value, "loss": 1.0}}
            for seed, value in enumerate(values)
        }

    runs = {ours.name: {"settings": [], "seeds": seeds(0.7, 0.8)}}
    runs[other.name] = {"settings": list(other.of(base)), "seeds": seeds(0.8, 0.8)}
    written = {"before": {base: {"iou": 0.2, "loss": 3.0}}, "runs": {base: runs}}
    found = page.curves(written, base, ours)
    assert page.steps_to(found, 0.2, 0.4) == pytest.approx(50)
    assert page.steps_to(found, 0.2, 0.675) == pytest.approx(150)
    assert page.steps_to(found, 0.2, 0.76) is None
    lines = list(page.of_base(written, base, [ours, other]))
    low, high = 0.05 - 12.706 * 0.05, 0.05 + 12.706 * 0.05  # differences 0.1 and 0, one degree of freedom
    assert (
        lines[3]
        == f"| {other.name} | | 0.600 | 0.800 | | | +0.050 ({low:+.3f} to {high:+.3f}) at 200 | 175 | 200 | 1.000 | 2 |"
    )
    runs[other.name]["settings"] = []
    assert (
        list(page.of_base(written, base, [other]))[2].replace(" ", "") == f"|{other.name.replace(' ', '')}{'|' * 11}"
    ), "blank"


def test_pages_are_written_from_the_file(quality: Any) -> None:
    page, written = quality.quality_page, json.loads(quality.KNOWN.read_text())
    for name, lines in (("defaults.md", page.tables(written)), ("adapters.md", page.of_adapters(written))):
        text = (page.DOCS / name).read_text(encoding="utf-8")
        assert page.with_section(text, lines) == text, "run python scripts/quality.py --page"
