"""What is learnt from one micro-batch: which noise each sample gets, at which level, and what of the error counts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen_image_finetune import flow, loading
from qwen_image_finetune.config import Config
from qwen_image_finetune.data.batches import MicroBatch
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.records import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ModelMixin


class Objective:
    """Loss of one micro-batch."""

    def __init__(
        self, config: Config, family: Family, transformer: ModelMixin, scheduler_config: Any, accelerator: Accelerator
    ) -> None:
        """
        Args:
            transformer: the one that is trained, without the wrappers of several processes.
            scheduler_config: constants of the checkpoint's scheduler, which decide the timestep shift.
        """
        self.train, self.weighting = config.train, config.loss
        self.measure = flow.measure(config.loss.type, config.loss.huber_delta, config.loss.huber_schedule)
        self.family, self.scheduler_config, self.accelerator = family, scheduler_config, accelerator
        self.dtype = loading.weight_dtype(config.train.mixed_precision)
        self.dropout = bool(config.model.lora and config.model.lora.drops_at_random)
        self.transformer = transformer
        self.guidance = config.train.guidance_scale if family.distilled_guidance(transformer.config) else None

    def shift(self, latent_shape: Sequence[int]) -> float:
        """Timestep shift of a target latent: the model's own for its number of tokens, or the configured constant."""
        if self.train.sigma_shift != "model":
            return float(self.train.sigma_shift)
        tokens, steps = self.family.tokens(latent_shape), self.family.num_inference_steps
        mu = self.family.mu(tokens, self.scheduler_config, steps)
        return flow.shift_factor(mu, self.scheduler_config)

    def weight(self, batch: Batch) -> Tensor | None:
        """Loss weights (B, H, W) of a batch with masks."""
        if not self.weighting.mask_loss or batch.mask is None:
            return None
        foreground, background = self.weighting.foreground_weight, self.weighting.background_weight
        return background + (foreground - background) * batch.mask

    def __call__(self, module: nn.Module, batch: Batch, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Loss (B,) float32 on the device, and the noise levels (B,) it was taken at, on the CPU.

        Args:
            module: the transformer, or the wrapper around it that averages its gradients over processes.
        """
        shape = batch.target.shape[1:]
        sigma, noise = flow.draw(
            batch.keys, micro.visits, self.train.seed, shape, self.train.sigma_distribution, self.shift(shape),
            self.weighting.sigma_range,
        )  # fmt: skip
        if self.dropout:  # the only user of the global random state: make it a function of the samples as well
            torch.manual_seed(flow.seed_of("dropout", self.train.seed, *batch.keys, *micro.visits))
        return self.loss(module, batch.to(self.accelerator.device, self.dtype), sigma, noise), sigma

    def loss(self, module: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
        """Loss (B,) float32 of a batch on the device at noise levels (B,) and noise (B, C, H, W), float32 anywhere."""
        device = self.accelerator.device
        velocity = partial(self.family.velocity, module, batch=batch, guidance=self.guidance)
        sigma = sigma.to(device)
        with self.accelerator.autocast():
            found = flow.loss(velocity, batch.target, sigma, noise.to(device), self.weight(batch), self.measure)
        at_level = flow.level_weight(self.weighting.weighting, sigma)
        return found if at_level is None else found * at_level
