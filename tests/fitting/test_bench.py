"""The bench on tiny models: every kind of row runs on a CPU, and what is written follows from what was measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.fitting import bench
from qwen_image_finetune.fitting.bench import BASELINE, VARIANTS, Options, run, table

EAGER = tuple(name for name, variant in VARIANTS.items() if not variant.train.get("compile"))  # compiling takes long


@pytest.mark.parametrize("family", ["FluxKontext", "QwenImageEdit"])
def test_every_row_that_is_not_compiled(family: str, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    lines: list[str] = []
    options = Options(family, EAGER, tiny=True, steps=2, rank=4, peak_tflops=1.0, output=output)
    rows = run(options, lines.append)
    assert [row["variant"] for row in rows] == [BASELINE, *(name for name in EAGER if name != BASELINE)]
    assert json.loads(output.read_text()) == rows
    for row in rows:
        assert len(row["steps"]) == 4  # two rounds
        assert row["milliseconds"] == statistics.median(row["steps"])
        assert row["ratio"] == pytest.approx(rows[0]["milliseconds"] / row["milliseconds"])
        assert row["images_per_second"] == pytest.approx(1e3 / row["milliseconds"])
        assert row["utilisation"] == pytest.approx(row["tflops"])
        assert row["attention"] == "flash"
        assert 0.5 < row["loss"] < 5
    assert all(any(line.startswith(name) for line in lines) for name in EAGER)


def test_a_row_that_fails_says_why_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no room\nfor details")

    monkeypatch.setattr(bench, "quantised", fail)
    rows = run(Options("FluxKontext", ("nf4", "attention"), tiny=True, steps=1, rank=4), lambda line: None)
    assert rows[1] == {"variant": "nf4", "error": "OutOfMemoryError: no room"}
    assert rows[2]["ratio"] > 0
    assert "no room" in table(rows)[2]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="variants \\['fast'\\] are not among"):
        run(Options("FluxKontext", ("fast",), tiny=True))
    with pytest.raises(ConfigError, match="--size 1 1: FluxKontext takes multiples of 16"):
        run(Options("FluxKontext", size=(1, 1), tiny=True))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no card here"):
            run(Options("FluxKontext"))
