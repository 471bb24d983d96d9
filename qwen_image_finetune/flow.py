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

Velocity = Callable[[Tensor, Tensor], Tensor]  # (noisy (B, C, H, W), timestep (B,) float32) -> (B, C, H, W)


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on the process, nor the machine)."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Timestep shift s' = shift / (shift + 1/s - 1), with shift = e^mu; the scheduler's exponential time shift."""
    return shift / (shift + (1 / sigma - 1))


def draw(
    keys: Sequence[str], visits: Sequence[int], seed: int, shape: Sequence[int], distribution: str, shift: float
) -> tuple[Tensor, Tensor]:
    """Noise levels (B,) and noise (B, *shape), float32 on the CPU: a pure function of (seed, sample, its visit).

    Because nothing else enters, a resumed run, another number of processes or another batch size sees the same noise.

    Args:
        distribution: "logit_normal" (mean 0, deviation 1; Esser et al. 2024) or "uniform".
        shift: factor of `shifted`, applied after the draw.
    """
    levels, noises = [], []
    for key, visit in zip(keys, visits, strict=True):
        generator = torch.Generator().manual_seed(seed_of("noise", seed, key, visit))
        if distribution == "uniform":
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


def loss(velocity: Velocity, target: Tensor, sigma: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity per sample, (B,) float32.

    Args:
        target: (B, C, H, W) clean latents, in the dtype the transformer is fed.
        weight: (B, H, W) weights of the latent cells; the loss is their weighted mean, so its scale is that of the
            plain loss whatever the share of the foreground.
    """
    noisy = noisy_latents(target, sigma, noise).to(target.dtype)
    error = (velocity(noisy, sigma).float() - (noise - target.float())).square().mean(dim=1)  # (B, H, W)
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
) -> Tensor:
    """Walk from noise (B, C, H, W) to latents of the same shape and dtype with the scheduler's Euler steps.

    The timestep takes the pipelines' way through the dtype of the latents, so that pictures equal theirs to the bit.

    Args:
        own_levels: as in `set_timesteps`; these stay float32.
    """
    latents = noise
    for step, time in enumerate(set_timesteps(scheduler, steps, mu, noise.device, own_levels)):
        timestep = time.expand(len(latents)).to(latents.dtype) / 1000
        if own_levels:
            timestep = scheduler.sigmas[step].expand(len(latents))
        predicted = velocity(latents, timestep)
        latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
        progress(step + 1)
    return latents


def shift_factor(mu: float, scheduler_config: Any) -> float:
    """The training shift e^mu; checkpoints without dynamic shifting name a constant one."""
    if scheduler_config.get("use_dynamic_shifting", False):
        return math.exp(mu)
    return float(scheduler_config.get("shift", 1.0))
