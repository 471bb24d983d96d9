"""The objective and the sampler, once for all families.

Rectified flow: x_s = (1 - s) x0 + s eps, velocity v = eps - x0 (Liu et al. 2022; Esser et al. 2024). The transformer is
told s; the sampler walks s from 1 to 0 with Euler steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

WHOLE = (0.0, 1.0)  # range of noise levels
LEAST_LEVEL = 1e-3  # of diffusers' schedulers; below it sigma_sqrt would count a sample a million times
MOST_SNR = 5.0  # of min_snr (Hang et al. 2023)
Velocity = Callable[[Tensor, Tensor], Tensor]  # (noisy (B, C, H, W), timestep (B,) float32) -> (B, C, H, W)
Measure = Callable[[Tensor, Tensor], Tensor]  # (error (B, C, H, W), noise level (B, 1, 1, 1)) -> (B, C, H, W)


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on the process, nor the machine)."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Timestep shift s' = shift / (shift + 1/s - 1), with shift = e^mu; the scheduler's exponential time shift."""
    return shift / (shift + (1 / sigma - 1))


def levels_at(share: Tensor, distribution: str, shift: float, bounds: Sequence[float] = WHOLE) -> Tensor:
    """Noise levels, not shifted yet, below which lie these shares of those that are drawn; float64.

    Args:
        share: in (0, 1), any shape.
        bounds: least and most level after the shift; of the distribution, what lies between them is kept.
    """
    ends = shifted(torch.tensor(list(bounds), dtype=torch.float64), 1 / shift)  # back to before the shift
    if distribution == "uniform":
        return ends[0] + (ends[1] - ends[0]) * share
    low, high = torch.special.ndtr(torch.logit(ends))
    return torch.sigmoid(torch.special.ndtri(low + (high - low) * share))


def draw(
    keys: Sequence[str],
    visits: Sequence[int],
    seed: int,
    shape: Sequence[int],
    distribution: str,
    shift: float,
    bounds: Sequence[float] = WHOLE,
    strata: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise levels (B,) and noise (B, *shape), float32 on the CPU: a pure function of (seed, sample, its visit).

    Because nothing else enters, but for strata, a resumed run, another number of processes or another batch size sees
    the same noise.

    Args:
        distribution: "logit_normal" (mean 0, deviation 1; Esser et al. 2024) or "uniform".
        shift: factor of `shifted`, applied after the draw.
        bounds: least and most level after it.
        strata: of each sample (k, n): its level is among those with the shares k / n to (k + 1) / n of the distribution
            below them.
    """
    levels, noises = [], []
    for key, visit, (part, parts) in zip(keys, visits, strata or [(0, 1)] * len(keys), strict=True):
        generator = torch.Generator().manual_seed(seed_of("noise", seed, key, visit))
        if tuple(bounds) != WHOLE or parts > 1:
            inside = torch.rand((), generator=generator, dtype=torch.float64)
            share = ((part + inside) / parts).clamp(1e-9, 1 - 1e-9)
            level = levels_at(share, distribution, shift, bounds).float()
        elif distribution == "uniform":
            level = torch.rand((), generator=generator)
        else:
            level = torch.sigmoid(torch.randn((), generator=generator))
        levels.append(level.clamp(min=torch.finfo(torch.float32).tiny))
        noises.append(torch.randn(tuple(shape), generator=generator))
    return shifted(torch.stack(levels), shift), torch.stack(noises)


def noisy_latents(target: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x_s = (1 - s) x0 + s eps in float32, (B, C, H, W)."""
    level = sigma.view(-1, 1, 1, 1)
    return (1 - level) * target.float() + level * noise


def squared(error: Tensor, sigma: Tensor) -> Tensor:
    """The square of an error, at any noise level."""
    return error.square()


def measure(type: str, delta: float, schedule: str) -> Measure:
    """How an error e counts, with e^2 for small ones whatever the type but l1.

    huber: e^2 up to d, then 2 d |e| - d^2 (twice torch's). pseudo_huber: 2 d^2 (sqrt(1 + (e / d)^2) - 1). l1: |e|.

    Args:
        delta: d; with schedule "exponential" d to the power of the noise level (Khrapov et al. 2024), so 1 without
            noise and `delta` at pure noise.
    """
    if type == "mse":
        return squared
    if type == "l1":
        return lambda error, sigma: error.abs()

    def beyond(error: Tensor, sigma: Tensor) -> Tensor:
        turn = delta**sigma if schedule == "exponential" else torch.full_like(sigma, delta)
        if type == "huber":
            size = error.abs()
            return torch.where(size <= turn, error.square(), 2 * turn * size - turn.square())
        # The same as above; of small errors the difference to 1 would keep no digit.
        return 2 * error.square() / ((1 + (error / turn).square()).sqrt() + 1)

    return beyond


def level_weight(weighting: str, sigma: Tensor) -> Tensor | None:
    """What the loss at a noise level counts, in the shape of `sigma`; None for "none".

    sigma_sqrt and cosmap are those of Esser et al. 2024, as diffusers' `compute_loss_weighting_for_sd3` has them;
    min_snr is that of a velocity (Hang et al. 2023), min(SNR, 5) / (SNR + 1) with SNR = ((1 - s) / s)^2.
    """
    if weighting == "none":
        return None
    if weighting == "sigma_sqrt":
        return sigma.clamp(min=LEAST_LEVEL) ** -2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    snr = ((1 - sigma) / sigma).square()
    return snr.clamp(max=MOST_SNR) / (snr + 1)


def loss(
    velocity: Velocity,
    target: Tensor,
    sigma: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
    measure: Measure = squared,
) -> Tensor:
    """Mean error of the velocity per sample, (B,) float32; squared, if not measured otherwise.

    Args:
        target: (B, C, H, W) clean latents, in the dtype the transformer is fed.
        weight: (B, H, W) weights of the latent cells; the loss is their weighted mean, so its scale is that of the
            plain loss whatever the share of the foreground.
        measure: as `measure` makes it.
    """
    noisy = noisy_latents(target, sigma, noise).to(target.dtype)
    difference = velocity(noisy, sigma).float() - (noise - target.float())
    error = measure(difference, sigma.view(-1, 1, 1, 1)).mean(dim=1)  # (B, H, W)
    if weight is None:
        return error.mean(dim=(1, 2))
    return (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1e-8)


def set_timesteps(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: int, mu: float, device: Any = "cpu", own_levels: bool = False
) -> Tensor:
    """Timesteps (steps,) in [0, 1000] as the pipelines set them: linear from 1 to 1/steps, then shifted.

    Args:
        own_levels: the scheduler chooses them, from its largest level to its smallest, with the constant shift it has.
    """
    if own_levels:
        scheduler.set_timesteps(steps, device=device)
        scheduler.set_begin_index(0)
        return scheduler.timesteps
    sigmas = np.linspace(1.0, 1 / steps, steps)
    with np.errstate(invalid="ignore"):
        scheduler.set_timesteps(sigmas=sigmas, mu=mu, device=device)
    if steps == 1:  # the only step starts at pure noise; stretching to shift_terminal makes 0 / 0 of it
        scheduler.sigmas[0], scheduler.timesteps[0] = 1.0, float(scheduler.config.num_train_timesteps)
    scheduler.set_begin_index(0)
    return scheduler.timesteps


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    scheduler: FlowMatchEulerDiscreteScheduler,
    steps: int,
    mu: float,
    progress: Callable[[int], None] = lambda step: None,
    own_levels: bool = False,
    rounds_levels: bool = False,
) -> Tensor:
    """Walk from noise (B, C, H, W) to latents of the same shape and dtype with the scheduler's Euler steps.

    The timestep takes the pipelines' way through the dtype of the latents, so that pictures equal theirs to the bit.

    Args:
        own_levels: as in `set_timesteps`; these stay float32.
        rounds_levels: a timestep is divided by 1000 before it is rounded, not after it.
    """
    latents = noise
    for step, time in enumerate(set_timesteps(scheduler, steps, mu, noise.device, own_levels)):
        timestep = time.expand(len(latents)).to(latents.dtype) / 1000
        if own_levels:
            timestep = scheduler.sigmas[step].expand(len(latents))
        elif rounds_levels:
            timestep = (time / 1000).expand(len(latents)).to(latents.dtype)
        predicted = velocity(latents, timestep)
        latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
        progress(step + 1)
    return latents


def shift_factor(mu: float, scheduler_config: Any) -> float:
    """The training shift e^mu; checkpoints without dynamic shifting name a constant one."""
    if scheduler_config.get("use_dynamic_shifting", False):
        return math.exp(mu)
    return float(scheduler_config.get("shift", 1.0))
