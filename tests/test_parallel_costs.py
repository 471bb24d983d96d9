"""The arithmetic of scripts/parallel_costs.py, against cases worked out by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "parallel_costs.py"
DOCUMENT = Path(__file__).parent.parent / "docs" / "distributed.md"


@pytest.fixture(scope="module")
def costs() -> Any:
    import sys

    spec = importlib.util.spec_from_file_location("parallel_costs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parallel_costs"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sizes(costs: Any) -> dict[str, Any]:
    return {size.name: size for size in costs.sizes()}


def test_sizes_of_the_models(sizes: dict[str, Any]) -> None:
    """Adapters by hand: rank 16 times (in + out) of to_q, to_k, to_v and to_out.0."""
    flux, qwen = sizes["FLUX.1 Kontext"], sizes["Qwen-Image-Edit"]
    square = 16 * (3072 + 3072)
    assert flux.adapter == 19 * 4 * square + 38 * 3 * square  # single blocks have no to_out
    assert qwen.adapter == 60 * 4 * square
    assert 11.89e9 < flux.base < 11.91e9 and 20.42e9 < qwen.base < 20.44e9  # as published: 12 and 20 billion


@pytest.mark.parametrize(
    ("full", "processes", "accumulation", "expected"),
    [
        # A base of 1000, an adapter of 10, a unit of 50 weights.
        # LoRA alone: 1000 x 2 + 10 x 16. Gradients of 10 x 4 bytes, all-reduced over two: 2 x 40 / 2.
        (False, 1, 1, {"data parallel": (2160, 0)}),
        # Shared by two: half, and two units of 50 x 2. Gathered twice: 2 x (2000 + 40) / 2; gradients once: 40 / 2.
        (False, 2, 1, {"data parallel": (2160, 40), "FSDP2": (1080 + 200, 2040 + 20)}),
        # Three micro-batches gather three times as often; data parallel sends once a step.
        (False, 2, 3, {"data parallel": (2160, 40), "FSDP2": (1280, 3 * 2060)}),
        # All trained, on four: 1000 x 16; 2 x 4000 x 3/4. Shared: 16000 / 4 and two units of 50 x 4; 3 x 4000 x 3/4.
        (True, 4, 1, {"data parallel": (16000, 6000), "FSDP2": (4000 + 400, 9000)}),
    ],
)
def test_by_hand(
    costs: Any, full: bool, processes: int, accumulation: int, expected: dict[str, tuple[float, float]]
) -> None:
    size = costs.Size("toy", base=1000, adapter=10, unit=50)
    found = {way: (held, sent) for way, held, sent in costs.rows(size, full, processes, accumulation)}
    assert found.keys() == expected.keys()
    for way, figures in expected.items():
        assert found[way] == pytest.approx(figures), way


def test_the_documentation_quotes_it(costs: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["parallel_costs.py"])
    costs.main()
    printed = capsys.readouterr().out
    text = DOCUMENT.read_text(encoding="utf-8")
    quoted = text.split("<!-- scripts/parallel_costs.py -->\n```\n", 1)[1].split("```", 1)[0]
    assert len(quoted.splitlines()) > 20
    for line in quoted.splitlines():
        assert line in printed.splitlines(), line
