"""Pairs that are not trained on, and the loss on them: what training's own loss cannot show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_image_finetune import flow
from qwen_image_finetune.config import Config, ConfigError, ValidationConfig
from qwen_image_finetune.data import alike
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.data.part import Part, spread
from qwen_image_finetune.encoding.cache import EncodedDataset
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.machine import console
from qwen_image_finetune.preparation import open_dataset
from qwen_image_finetune.records import Batch, Encoded, collate
from qwen_image_finetune.training.objective import Objective


class Pairs(NamedTuple):
    """What is trained on, and what is not; None where nothing is held out."""

    training: ImageDataset
    held_out: ImageDataset | None


def open_pairs(config: Config, family: Family, decode: bool = False) -> Pairs:
    """The data set of a configuration, checked, and the pairs that validation holds out of it or reads beside it.

    Held-out rows are those validation needs, spread over all there are. None has an input that looks like one that is
    trained on.

    Raises:
        DataError: with all problems, before any model is loaded.
        ConfigError: validation.share cannot be held out.
    """
    dataset, settings = open_dataset(config, family, decode), config.validation
    if not settings.enabled or (settings.dataset_path is None and settings.share == 0):
        return Pairs(dataset, None)
    if settings.dataset_path is None:
        try:
            chosen = alike.choose(dataset, settings.share)
        except ValueError as error:
            raise ConfigError(f"validation.share={settings.share}: {error}") from error
        left = sorted(set(range(len(dataset))) - set(chosen))
        console.note(
            f"{len(chosen)} of {len(dataset)} pairs are held out of training (validation.share={settings.share})"
        )
        return Pairs(Part(dataset, left), needed(config, Part(dataset, chosen)))

    arguments = config.data.init_args.model_copy(update={"dataset_path": settings.dataset_path})
    data = config.data.model_copy(update={"init_args": arguments})
    folder = open_dataset(config.model_copy(update={"data": data}), family, decode)
    leaking = set(alike.leaking(folder, dataset))
    if len(leaking) == len(folder):
        raise DataError(f"validation.dataset_path={settings.dataset_path}: every input of it is also trained on")
    if leaking:
        names = ", ".join(folder.rows[row].key for row in sorted(leaking)[:3])
        console.note(
            f"{len(leaking)} of {len(folder)} held-out pairs are left out: their inputs look like some that are "
            f"trained on ({names}{', ...' if len(leaking) > 3 else ''})"
        )
    return Pairs(dataset, needed(config, Part(folder, sorted(set(range(len(folder))) - leaking))))


def needed(config: Config, held_out: ImageDataset) -> ImageDataset:
    """The held-out rows that validation uses; the others need not be encoded."""
    number = max(config.validation.num_loss_pairs, config.validation.num_validation_samples)
    return Part(held_out, spread(number, len(held_out)))


def encoded(
    config: Config, family: Family, pairs: Pairs, checkpoint: Path, dtype: torch.dtype
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """(rows to train on, held-out rows), with the texts that each of them needs."""
    if pairs.held_out is None:
        return EncodedDataset(config, family, pairs.training, checkpoint, dtype), None
    held_out = EncodedDataset(config, family, pairs.held_out, checkpoint, dtype, trained_on=False)
    # Samples are drawn from these, so the others need no negative prompts.
    unseen = config.model_copy(update={"validation": config.validation.model_copy(update={"enabled": False})})
    return EncodedDataset(unseen, family, pairs.training, checkpoint, dtype), held_out


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
        normal = self.objective.train.sigma_distribution == "logit_normal"
        levels = torch.sigmoid(torch.special.ndtri(share)) if normal else share
        noise = torch.randn((self.strata, *row.target.shape), generator=generator)
        return flow.shifted(levels.float(), self.objective.shift(row.target.shape)), noise
