"""Weights in bfloat16 are rounded alike in all processes, and stay the same in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import accelerated
from outcomes import losses, weights

OPTIONS = (
    "train.max_train_steps=3", "train.checkpointing_steps=1", "model.lora=null", "train.mixed_precision=bf16",
    "train.weight_precision=bf16", "optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}",
)  # fmt: skip


def test_two_processes_learn_what_one_does(
    task: Callable[..., Any], run_all: Callable[..., Any], alone: Callable[..., Path]
) -> None:
    """Sums of two gradients are rounded in another order: a few weights in a thousand take the other neighbour."""
    job = task("FluxKontext", "narrow", *OPTIONS)
    reference = alone(job, "train.gradient_accumulation_steps=2")
    onwards = task("FluxKontext", "onwards", *OPTIONS, resume=[str(reference), 1])
    for result in run_all([accelerated("ddp.yaml", 2)], [job, onwards])[0]:
        found, expected = weights(result["run"]), weights(reference)
        unlike = sum(int((found[name] != value).sum()) for name, value in expected.items())
        assert unlike < 0.01 * sum(value.numel() for value in expected.values())
        assert losses(result["run"]) == pytest.approx(losses(reference)[-len(losses(result["run"])) :], rel=1e-3)
