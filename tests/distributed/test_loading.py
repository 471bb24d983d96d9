"""Several processes hold one copy of the model in host memory between them, or none, on the way to their devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxTransformer2DModel
from launching import HERE

LARGEST = 0.1  # of the model: a tensor or two on their way, and what malloc keeps


@pytest.fixture(scope="module")
def larger(build_once: Callable[..., Path]) -> Path:
    """A transformer of 150 MB in files of 50."""

    def build(folder: Path) -> None:
        model: Any = FluxTransformer2DModel(
            num_layers=4, num_single_layers=8, attention_head_dim=64, num_attention_heads=6, joint_attention_dim=64,
            pooled_projection_dim=64, axes_dims_rope=(16, 24, 24), guidance_embeds=True,
        )  # fmt: skip
        model.save_pretrained(folder / "transformer", max_shard_size="50MB")

    return build_once("larger-flux", build)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_host_memory(processes: int, larger: Path, torchrun: Callable[..., Any], tmp_path: Path) -> None:
    done = torchrun(processes, str(HERE / "loads.py"), str(larger), str(tmp_path / "result"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((tmp_path / f"result.{rank}.json").read_text()) for rank in range(processes)]
    whole = found[0]["whole"]["held"]
    assert whole > 140e6
    noise = LARGEST * whole
    for process in found:
        assert abs(process["whole"]["peak"] - whole) < noise  # on the CPU it stays there: one copy, and no second one
        assert process["elsewhere"]["peak"] < noise  # on its way to another device, one tensor at a time
        # What waits on the host, and no more: four of the twelve blocks, whose two kinds differ in size.
        assert 0.2 * whole < process["swapped"]["held"] < 0.5 * whole
        assert abs(process["swapped"]["peak"] - process["swapped"]["held"]) < noise
    if processes > 1:
        assert sum(process["shared"]["held"] for process in found) == pytest.approx(whole, rel=0.01)
        for process in found:
            assert abs(process["shared"]["peak"] - process["shared"]["held"]) < noise
