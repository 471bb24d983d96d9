"""Whoever wrote a checkpoint, whoever loads it has the same state, to the last bit, and goes on as if nothing were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import one_machine
from outcomes import checkpoint, files, losses, state_files

OPTIONS = (
    "train.max_train_steps=3", "train.checkpointing_steps=1", "optimizer.class_path=torch.optim.AdamW",
    "optimizer.init_args={lr: 0.001}", "lr_scheduler.scheduler_type=cosine", "lr_scheduler.warmup_steps=1",
)  # fmt: skip
KINDS = {"lora": ("FluxKontext", ()), "full": ("QwenImageEdit", ("model.lora=null",))}
WRITERS = {
    "one": (1, False),
    "parallel": (2, False),
    "shared": (2, True),
}  # processes; shared?


def test_from_any_to_any(
    task: Callable[..., Any], run_all: Callable[..., Any], alone: Callable[..., Path], tmp_path: Path
) -> None:
    """Four batches a step, by one process, two or four, which share the model or do not; a LoRA, or all weights."""

    def job(kind: str, name: str, processes: int, shared: bool, **more: Any) -> dict[str, Any]:
        family, overrides = KINDS[kind]
        accumulation = f"train.gradient_accumulation_steps={4 // processes}"
        return task(family, f"{name}-{kind}", *OPTIONS, *overrides, accumulation, shared=shared, **more)

    def resumed(kind: str, writer: str, processes: int, shared: bool) -> dict[str, Any]:
        name = f"{writer}-to-{processes}-{'shared' if shared else 'parallel'}"
        again = str(tmp_path / f"{name}-{kind}")
        return job(kind, name, processes, shared, resume=[written[kind, writer], 2], again=again)

    written = {(kind, "one"): str(alone(job(kind, "one", 1, False))) for kind in KINDS}
    two = [(kind, writer) for kind in KINDS for writer in ("parallel", "shared")]
    results = run_all(one_machine(2), [job(kind, writer, *WRITERS[writer]) for kind, writer in two])[0]
    written |= {key: result["run"] for key, result in zip(two, results, strict=True)}

    both = [(kind, writer, True) for kind in KINDS for writer in ("one", "shared", "parallel")]
    for processes, ways in {
        1: [(kind, "shared", False) for kind in KINDS],
        2: both,
        4: [("lora", "shared", False), ("full", "shared", True)],
    }.items():
        jobs = [(kind, writer, resumed(kind, writer, processes, shared)) for kind, writer, shared in ways]
        done = run_all(one_machine(processes), [each for _, _, each in jobs])[0]
        for (kind, writer, each), result in zip(jobs, done, strict=True):
            source = checkpoint(written[kind, writer], 2)
            again = Path(each["again"])
            assert state_files(again) == state_files(source), each["again"]
            assert files(again) == files(source), each["again"]
            expected = losses(written[kind, writer])[2:]
            if again.name in ("shared-to-2-shared-lora", "shared-to-2-shared-full"):
                assert losses(result["run"]) == expected
                assert state_files(checkpoint(result["run"])) == state_files(checkpoint(written[kind, writer]))
            assert losses(result["run"]) == pytest.approx(expected, rel=1e-5)
