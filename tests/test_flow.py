"""The objective and the sampler against the published numbers, the pipelines' scheduler and float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from qwen_image_finetune import flow, loading
from qwen_image_finetune.data.batches import MicroBatch, stratified
from qwen_image_finetune.families import get_family

# (width, height), tokens, mu and e^mu of FLUX Kontext, the same of Qwen-Image-Edit
SHIFTS = [
    ((512, 512), 1024, (0.6300, 1.8776), (0.5387, 1.7138)),
    ((832, 576), 1872, (0.7735, 2.1674), (0.5815, 1.7886)),
    ((768, 768), 2304, (0.8467, 2.3319), (0.6032, 1.8280)),
    ((1024, 1024), 4096, (1.1500, 3.1582), (0.6935, 2.0008)),
    ((1328, 1328), 6889, (1.6228, 5.0671), (0.8343, 2.3033)),
]


@pytest.mark.parametrize("name,column", [("FluxKontext", 2), ("QwenImageEdit", 3)])
def test_shift_follows_the_checkpoints_own_constants(name: str, column: int, tiny_checkpoints: dict[str, Path]) -> None:
    family, config = get_family(name), loading.load_scheduler(tiny_checkpoints[name]).config
    for row in SHIFTS:
        (width, height), tokens = row[0], row[1]
        assert family.tokens((16, height // 8, width // 8)) == tokens
        mu, factor = row[column]
        assert family.mu(tokens, config, 28) == pytest.approx(mu, abs=5e-5)
        assert flow.shift_factor(family.mu(tokens, config, 28), config) == pytest.approx(factor, abs=5e-5)


@pytest.mark.parametrize(
    "name,steps,head,tail",
    [
        ("FluxKontext", 28, [1, 0.9884, 0.9762, 0.9634], [0.1955, 0.1047, 0]),
        ("QwenImageEdit", 40, [1, 0.9870, 0.9736, 0.9599], [0.0679, 0.0200, 0]),
    ],
)
def test_sigmas_at_1024_are_the_pipelines(
    name: str, steps: int, head: list[float], tail: list[float], tiny_checkpoints: dict[str, Path]
) -> None:
    family, scheduler = get_family(name), loading.load_scheduler(tiny_checkpoints[name])
    flow.set_timesteps(scheduler, steps, family.mu(4096, scheduler.config, steps))
    sigmas = scheduler.sigmas.tolist()
    assert len(sigmas) == steps + 1
    assert sigmas[: len(head)] == pytest.approx(head, abs=5e-5)
    assert sigmas[-len(tail) :] == pytest.approx(tail, abs=5e-5)


def test_draw_is_a_function_of_seed_sample_and_visit_alone() -> None:
    sigma, noise = flow.draw(["a", "b"], [0, 3], 42, (4, 6, 8), "logit_normal", 2.0)
    alone_sigma, alone_noise = flow.draw(["b"], [3], 42, (4, 6, 8), "logit_normal", 2.0)
    assert torch.equal(sigma[1:], alone_sigma) and torch.equal(noise[1:], alone_noise)
    for other in (
        flow.draw(["b"], [4], 42, (4, 6, 8), "logit_normal", 2.0),
        flow.draw(["c"], [3], 42, (4, 6, 8), "logit_normal", 2.0),
        flow.draw(["b"], [3], 43, (4, 6, 8), "logit_normal", 2.0),
    ):
        assert not torch.equal(other[1], alone_noise)
        assert not torch.equal(other[0], alone_sigma)


def test_draw_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    flow.draw(["a"], [0], 0, (4, 2, 2), "uniform", 1.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 3.1582])
def test_noise_levels_follow_the_stated_distribution(distribution: str, shift: float) -> None:
    keys = [str(index) for index in range(4000)]
    sigma = flow.draw(keys, [0] * len(keys), 1, (1, 1, 1), distribution, shift)[0].double().numpy()
    assert sigma.min() > 0 and sigma.max() <= 1
    unshifted = sigma / (shift + sigma - shift * sigma)  # inverse of s' = shift / (shift + 1/s - 1)
    if distribution == "logit_normal":
        test = stats.kstest(np.log(unshifted / (1 - unshifted)), "norm")
    else:
        test = stats.kstest(unshifted, "uniform")
    assert test.pvalue > 1e-3


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.7)])
def test_strata_cover_the_distribution_evenly(bounds: tuple[float, float]) -> None:
    """Of a step's samples each has another part of the distribution, by its own cumulative function; all of them over
    many steps are distributed as without."""
    micros = [MicroBatch((0, 1, 2), (0, 0, 0), (False,) * 3, False), MicroBatch((3, 4), (0, 0), (False,) * 2, False)]
    ends = [float(stats.norm.cdf(np.log(end / (1 - end)))) if 0 < end < 1 else end for end in
            (bound / (2 + bound - 2 * bound) for bound in bounds)]  # fmt: skip
    shares = []
    for step in range(400):
        found = stratified(micros, 7, step)
        strata = [each for micro in found for each in micro.strata or ()]
        assert [micro.rows for micro in found] == [micro.rows for micro in micros]
        assert sorted(strata) == [(part, 5) for part in range(5)]
        keys = [f"{step} {row}" for micro in found for row in micro.rows]
        sigma = flow.draw(keys, [0] * 5, 7, (1, 1, 1), "logit_normal", 2.0, bounds, strata)[0].double().numpy()
        below = stats.norm.cdf(np.log(sigma / (2 + sigma - 2 * sigma) / (1 - sigma / (2 + sigma - 2 * sigma))))
        shares.append((below - ends[0]) / (ends[1] - ends[0]))
        assert [int(share * 5) for share in shares[-1]] == [part for part, _ in strata]
    assert stats.kstest(np.concatenate(shares), "uniform").pvalue > 1e-3
    assert stats.kstest(np.array(shares)[:, 0], "uniform").pvalue > 1e-3  # of one place in the step too
    alone = flow.draw(["a"], [3], 7, (1, 1, 1), "uniform", 2.0)
    assert torch.equal(flow.draw(["a"], [3], 7, (1, 1, 1), "uniform", 2.0, strata=[(0, 1)])[0], alone[0])


def test_shift_equals_the_schedulers(tiny_checkpoints: dict[str, Path]) -> None:
    scheduler = loading.load_scheduler(tiny_checkpoints["FluxKontext"])
    levels = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    expected = scheduler.time_shift(0.8, 1.0, levels)
    assert torch.allclose(flow.shifted(levels, math.exp(0.8)), expected, rtol=1e-12)


def test_loss_is_the_squared_error_of_the_velocity_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    target, predicted = (torch.randn(3, 4, 6, 8, generator=generator) for _ in range(2))
    sigma, noise = flow.draw(["a", "b", "c"], [0, 0, 0], 0, (4, 6, 8), "uniform", 1.0)
    seen = {}

    def velocity(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.update(noisy=noisy, timestep=timestep)
        return predicted

    loss = flow.loss(velocity, target, sigma, noise)
    s, x, e, v = sigma.double().view(-1, 1, 1, 1), target.double(), noise.double(), predicted.double()
    assert torch.allclose(seen["noisy"].double(), (1 - s) * x + s * e, atol=1e-6)
    assert torch.equal(seen["timestep"], sigma) and sigma.dtype == torch.float32
    assert torch.allclose(loss.double(), (v - (e - x)).square().mean(dim=(1, 2, 3)), rtol=1e-5)


def test_weighted_loss_is_a_weighted_mean() -> None:
    target, noise, sigma = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2), torch.tensor([0.5])
    predicted = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]]])  # wrong in one cell of four, by 1
    weight = torch.tensor([[[1.0, 3.0], [0.0, 1.0]]])
    assert flow.loss(lambda noisy, timestep: predicted, target, sigma, noise).item() == 0.25
    assert flow.loss(lambda noisy, timestep: predicted, target, sigma, noise, weight).item() == pytest.approx(3 / 5)
    uniform = torch.full((1, 2, 2), 7.0)
    assert flow.loss(lambda noisy, timestep: predicted, target, sigma, noise, uniform).item() == pytest.approx(0.25)


def test_sampling_the_true_velocity_arrives_at_the_picture(tiny_checkpoints: dict[str, Path]) -> None:
    scheduler = loading.load_scheduler(tiny_checkpoints["FluxKontext"])
    generator = torch.Generator().manual_seed(0)
    target, noise = (torch.randn(1, 4, 6, 8, generator=generator) for _ in range(2))
    drawn = flow.sample(lambda latents, timestep: noise - target, noise, scheduler, steps=7, mu=0.9)
    assert torch.allclose(drawn, target, atol=1e-5)
