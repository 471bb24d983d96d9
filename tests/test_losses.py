"""What counts as an error, and at which noise levels: against torch, diffusers, and the formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from qwen_image_finetune import flow
from qwen_image_finetune.config import Config, ConfigError, load_config
from qwen_image_finetune.disk.history import read_metrics
from qwen_image_finetune.training.train import train

ERROR = torch.linspace(-3, 3, 61, dtype=torch.float64).view(1, 1, 1, -1)
LEVEL = torch.tensor([0.5], dtype=torch.float64).view(1, 1, 1, 1)


def test_the_types_are_those_of_torch() -> None:
    zero = torch.zeros_like(ERROR)
    huber = flow.measure("huber", 0.3, "constant")(ERROR, LEVEL)
    assert torch.allclose(huber, 2 * torch.nn.functional.huber_loss(ERROR, zero, reduction="none", delta=0.3))
    assert torch.equal(flow.measure("l1", 0.3, "constant")(ERROR, LEVEL), ERROR.abs())
    assert torch.equal(flow.measure("mse", 0.3, "constant")(ERROR, LEVEL), ERROR.square())
    pseudo = flow.measure("pseudo_huber", 0.3, "constant")(ERROR, LEVEL)
    assert torch.allclose(pseudo, 2 * 0.3 * ((ERROR.square() + 0.09).sqrt() - 0.3))
    for type in ("huber", "pseudo_huber"):  # a turn that nothing reaches leaves the square
        assert torch.allclose(flow.measure(type, 1e5, "constant")(ERROR, LEVEL), ERROR.square(), rtol=1e-5)
    small = torch.full((1, 1, 1, 1), 1e-5)  # float32, as in training
    assert flow.measure("pseudo_huber", 0.1, "constant")(small, LEVEL.float()).item() == pytest.approx(1e-10, rel=1e-5)


@pytest.mark.parametrize("type", ["huber", "pseudo_huber"])
def test_the_turn_follows_the_noise_level(type: str) -> None:
    scheduled = flow.measure(type, 0.01, "exponential")
    for level, delta in ((0.0, 1.0), (0.5, 0.1), (1.0, 0.01)):
        expected = flow.measure(type, delta, "constant")(ERROR, LEVEL)
        assert torch.allclose(scheduled(ERROR, torch.full_like(LEVEL, level)), expected)


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_weights_of_levels_are_those_of_diffusers(weighting: str) -> None:
    sigma = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(min=1e-3)
    assert torch.allclose(
        flow.level_weight(weighting, sigma), compute_loss_weighting_for_sd3(weighting, sigma).double()
    )


def test_min_snr_is_that_of_a_velocity() -> None:
    sigma = torch.tensor([1.0, 0.5, 0.2, 0.0])
    found = flow.level_weight("min_snr", sigma)
    assert found is not None
    assert torch.allclose(found, torch.tensor([0.0, 1 / 2, 5 / 17, 0.0]))
    assert flow.level_weight("none", sigma) is None


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
def test_levels_of_a_range_are_those_of_the_whole_that_lie_in_it(distribution: str) -> None:
    keys, shift, low, high = [str(number) for number in range(4000)], 3.0, 0.4, 0.9
    visits = [0] * len(keys)
    whole, _ = flow.draw(keys, visits, 0, (1,), distribution, shift)
    found, noise = flow.draw(keys, visits, 0, (1,), distribution, shift, (low, high))
    assert low <= found.min() and found.max() <= high and noise.std().item() == pytest.approx(1, abs=0.05)
    kept = whole[(whole >= low) & (whole <= high)].sort().values
    shares = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(found.quantile(shares), kept.quantile(shares), atol=0.02)
    again, _ = flow.draw(keys[5:6], [0], 0, (1,), distribution, shift, (low, high))
    assert torch.equal(again, found[5:6])  # of the sample alone


@pytest.mark.parametrize(
    "options",
    [("loss.type=pseudo_huber", "loss.huber_schedule=exponential", "loss.weighting=cosmap"),
     ("loss.type=l1", "loss.sigma_range=[0.2,0.8]", "loss.weighting=min_snr",
      "train.sigma_stratified=true", "data.batch_size=2")],
    ids=["huber", "range"],
)  # fmt: skip
def test_a_run_learns_resumes_and_is_held_to_it(options: tuple[str, ...], configure: Callable[..., Config]) -> None:
    rounds = ("validation={enabled: true, share: 0.3, steps: 2, num_inference_steps: 1, num_validation_samples: 1}",)
    steps = ("train.max_train_steps=4", "train.checkpointing_steps=2", *options, *rounds)
    whole = train(configure("FluxKontext", *steps))
    assert whole is not None
    losses = [line for line in read_metrics(whole) if "loss" in line]
    resumed = train(configure("FluxKontext", *steps, f"train.resume_from_checkpoint={whole / 'checkpoint-0-2'}",
                              "logging.tracker_project_name=other"))  # fmt: skip
    assert resumed is not None
    again = [line for line in read_metrics(resumed) if "loss" in line]
    assert [line["loss"] for line in losses[2:]] == [line["loss"] for line in again[-2:]]
    assert any("held_out_difference" in line for line in read_metrics(whole))


def test_another_loss_in_the_middle_of_a_run_is_said(
    configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(configure("FluxKontext", "train.max_train_steps=1"))
    train(configure("FluxKontext", "train.max_train_steps=2", f"train.resume_from_checkpoint={run}/checkpoint-0-1",
                    "loss.type=l1"))  # fmt: skip
    assert "note: loss.type='l1', but" in capsys.readouterr().out.replace('"', "'")


@pytest.mark.parametrize("given", ["[0.5, 0.5]", "[0.9, 0.1]", "[-1, 1]", "[0.1]"])
def test_a_range_that_is_none_is_refused(given: str, tmp_path: Any) -> None:
    (tmp_path / "c.yaml").write_text("model: {pretrained_model_name_or_path: Qwen/Qwen-Image-Edit}")
    with pytest.raises(ConfigError, match=r"loss\.sigma_range"):
        load_config(tmp_path / "c.yaml", [f"loss.sigma_range={given}"])
