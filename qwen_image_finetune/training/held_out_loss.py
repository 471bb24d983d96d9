"""The loss on pairs that are not trained on: what training's own loss cannot show."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen_image_finetune import flow
from qwen_image_finetune.config import ValidationConfig
from qwen_image_finetune.records import Batch, Encoded, collate
from qwen_image_finetune.training.objective import Objective


class HeldOutLoss:
    """Training's loss on held-out pairs, at the same noise and the same noise levels every time.

    Every pair is seen at `strata` levels, one in each equal part of training's distribution of levels, at a place
    inside the part that is the pair's own: so all pairs together cover it evenly.
    """

    def __init__(self, objective: Objective, settings: ValidationConfig) -> None:
        self.objective, self.strata, self.seed = objective, settings.num_loss_sigmas, settings.seed

    @torch.no_grad()
    def __call__(self, row: Encoded, cancelled: Callable[[], None] = lambda: None) -> float:
        """Mean loss of one pair."""
        objective = self.objective
        batch: Batch = collate([row]).to(objective.accelerator.device, objective.dtype)
        total = 0.0
        for sigma, noise in zip(*self.draw(row), strict=True):
            cancelled()
            total += float(objective.loss(objective.transformer, batch, sigma[None], noise[None]))
        return total / self.strata

    def draw(self, row: Encoded) -> tuple[Tensor, Tensor]:
        """Noise levels (strata,) and noise (strata, C, H, W) of a pair, float32 on the CPU."""
        generator = torch.Generator().manual_seed(flow.seed_of("held out", self.seed, row.key))
        place = torch.rand((), generator=generator, dtype=torch.float64)
        share = ((torch.arange(self.strata, dtype=torch.float64) + place) / self.strata).clamp(1e-6, 1 - 1e-6)
        train, shift = self.objective.train, self.objective.shift(row.target.shape)
        bounds = self.objective.weighting.sigma_range
        levels = flow.levels_at(share, train.sigma_distribution, shift, bounds)
        noise = torch.randn((self.strata, *row.target.shape), generator=generator)
        return flow.shifted(levels.float(), shift), noise
