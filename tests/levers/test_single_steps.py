"""Weights in bfloat16: rounded by chance to a neighbour, and in the mean where float32 weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from qwen_image_finetune.config import Config
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.estimate import Estimator
from qwen_image_finetune.levers.single_steps import RoundedSteps, rounded
from qwen_image_finetune.training.train import train
from qwen_image_finetune.training.trained import exact

NUMBER = 20_000  # weights, each an experiment of its own


def test_a_value_becomes_a_neighbour_and_stays_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for value in (1 / 3, -1 / 3, 1.0, -3e-5, 7e30, 0.0):
        values = torch.full((NUMBER,), value)
        found = rounded(values, generator).double()
        upper = torch.tensor(value).bfloat16().double()
        spacing = 2.0 ** (torch.tensor(value).abs().log2().floor() - 7) if value else torch.tensor(0.0)
        assert ((found - values.double()).abs() <= spacing).all() and len(found.unique()) <= 2
        share = float((found - values.double()).abs().max() / spacing) if value else 0.0
        deviation = float(spacing) * (max(share * (1 - share), 0) / NUMBER) ** 0.5
        assert abs(float(found.mean() - values.double().mean())) <= 5 * deviation + 1e-12 * abs(value), (value, upper)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=1e-4),
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=1e-4, fused=True),
    "AdamW8bit": lambda weights: bitsandbytes.optim.AdamW8bit(weights, lr=1e-4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_the_mean_it_is_what_float32_weights_do(name: str) -> None:
    """Steps of 1/80 of what separates neighbours at 1: rounded to the nearest, nothing would ever move."""

    def weights(dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.ones(NUMBER, dtype=dtype))

    master, stored = weights(torch.float32), weights(torch.bfloat16)
    masters, optimizer = OPTIMIZERS[name]([master]), OPTIMIZERS[name]([stored])
    steps = RoundedSteps(optimizer, seed=3)
    for number in range(40):
        master.grad, stored.grad = torch.ones(NUMBER), torch.ones(NUMBER, dtype=torch.bfloat16)
        masters.step()
        steps.number = number
        steps.step()
    assert stored.dtype == torch.bfloat16 and stored.grad is None
    moved, expected = 1 - stored.double(), float(1 - master.double().mean())
    error = float(moved.std()) / NUMBER**0.5
    assert expected == pytest.approx(4e-3, rel=0.05) and error < 0.02 * expected
    assert abs(float(moved.mean()) - expected) < 4 * error


def test_chance_is_a_function_of_seed_step_and_place() -> None:
    def after(seed: int, number: int, reverse: bool = False) -> list[Tensor]:
        weights = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
        steps = RoundedSteps(torch.optim.SGD(weights, lr=1e-3), seed)
        steps.number = number
        for weight in reversed(weights) if reverse else weights:
            weight.grad = torch.ones_like(weight)
            steps(weight)
        return [weight.detach() for weight in weights]

    first = after(1, 0)
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, after(1, 0, reverse=True)))
    assert not any(map(torch.equal, first, after(2, 0))) and not any(map(torch.equal, first, after(1, 1)))


def saved(run: Path | None, step: int) -> Path:
    assert run is not None
    return next(run.glob(f"checkpoint-*-{step}"))


def test_a_run_resumes_to_the_bit_and_releases_its_gradients(configure: Callable[..., Config]) -> None:
    options = (
        "model.lora=null", "train.mixed_precision=bf16", "train.weight_precision=bf16", "train.max_grad_norm=null",
        "optimizer={class_path: bitsandbytes.optim.AdamW8bit, init_args: {lr: 0.001}}", "train.max_train_steps=3",
        "train.checkpointing_steps=1",
    )  # fmt: skip
    run = train(configure("FluxKontext", *options))
    again = f"train.resume_from_checkpoint={saved(run, 1)}"
    released = ("train.release_gradients=true", "logging.tracker_project_name=released")
    others = [
        train(configure("FluxKontext", *options, again, "logging.tracker_project_name=again")),
        train(configure("FluxKontext", *options, *released)),
    ]
    whole = exact(saved(run, 3))
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}
    assert not (saved(run, 3) / "remainder.safetensors").exists()
    assert [name for name in whole if not torch.equal(whole[name], exact(saved(run, 1))[name])]
    for other in others:
        found = exact(saved(other, 3))
        assert found.keys() == whole.keys() and not [
            name for name in whole if not torch.equal(whole[name], found[name])
        ]


def test_the_plan_counts_half(configure: Callable[..., Config]) -> None:
    def device(*overrides: str) -> tuple[dict[str, int], Any]:
        config = configure("FluxKontext", "model.lora=null", "train.mixed_precision=bf16", *overrides)
        folder = Path(config.model.pretrained_model_name_or_path)
        estimator = Estimator(get_family("FluxKontext"), config, folder)
        return estimator.estimate().device, estimator.footprint

    wide, footprint = device()
    narrow, _ = device("train.weight_precision=bf16")
    assert [narrow[name] / wide[name] for name in ("weights", "gradients", "optimizer")] == [0.5, 0.5, 1]
    assert narrow["gradients"] == 2 * footprint.weights
    assert 0 < narrow["the weight that is updated"] == 16 * footprint.largest < 16 * footprint.weights
