"""What the learner does with gradients that cannot be learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from qwen_image_finetune.config import SchedulerConfig
from qwen_image_finetune.training.assembly import OVERFLOWS_IN_A_ROW, Learner
from qwen_image_finetune.training.optim import build_scheduler


@pytest.fixture
def half() -> Iterator[Learner]:
    """One weight, learnt as fp16 is on a card: with a gradient scaler, of which torch has one for the CPU as well."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    weight, model = nn.Parameter(torch.ones(1)), cast(Any, nn.Identity())
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = build_scheduler(SchedulerConfig(), optimizer, total_steps=100)
    yield Learner(accelerator, model, model, [weight], accelerator.prepare(optimizer), schedule)
    AcceleratorState._reset_state()


def step(learner: Learner, loss: float, slope: float) -> bool:
    """One step of a loss that falls by `slope`; whether it was sound."""
    scaler = learner.accelerator.scaler
    assert scaler is not None
    scaler.scale(learner.parameters[0] * slope).sum().backward()
    return learner.learn(loss, learner.gradient_norm(None))


def test_after_a_loss_that_is_not_finite_half_precision_goes_on(half: Learner) -> None:
    nan, scaler = float("nan"), half.accelerator.scaler
    assert scaler is not None
    assert step(half, 1.0, 0.25)
    assert not step(half, nan, nan)
    assert half.parameters[0].item() == 0.75 and scaler.get_scale() == 2.0**15
    assert step(half, 1.0, 0.25)
    assert half.parameters[0].item() == 0.5


def test_overflows_are_passed_over_but_not_for_ever(half: Learner) -> None:
    """Gradients that are never finite are no matter of the scale."""
    assert [step(half, 1.0, float("inf")) for _ in range(OVERFLOWS_IN_A_ROW - 1)] == [True] * (OVERFLOWS_IN_A_ROW - 1)
    assert not step(half, 1.0, float("inf"))
    assert step(half, 1.0, 0.25)
    assert step(half, 1.0, float("inf")), "the row begins anew"
    assert half.parameters[0].item() == 0.75
