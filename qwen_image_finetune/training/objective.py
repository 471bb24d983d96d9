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
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.records import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ModelMixin


class Objective:
    """Loss of one micro-batch: the error of the velocity and, if that is asked for, how far it left the model's own."""

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
        sigma, noise = self.draw(batch, micro)
        self._seed_dropout("dropout", batch, micro)
        return self.loss(module, batch.to(self.accelerator.device, self.dtype), sigma, noise), sigma

    def draw(self, batch: Batch, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Noise levels (B,) and noise (B, C, H, W) of a micro-batch, float32 on the CPU."""
        shape = batch.target.shape[1:]
        return flow.draw(
            batch.keys, micro.visits, self.train.seed, shape, self.train.sigma_distribution, self.shift(shape),
            self.weighting.sigma_range, micro.strata,
        )  # fmt: skip

    def _seed_dropout(self, word: str, batch: Batch, micro: MicroBatch) -> None:
        """Make dropout, the only user of the global random state, a function of the samples as well."""
        if self.dropout:
            torch.manual_seed(flow.seed_of(word, self.train.seed, *batch.keys, *micro.visits))

    def preservation(self, module: nn.Module, batch: Batch, micro: MicroBatch) -> Tensor:
        """Mean squared difference (B,) of the velocity to that without the adapter, float32 on the device.

        Gradients flow through the first alone. Noise and levels are those of the micro-batch: of the same pairs with
        other prompts, both see what the first term sees, but for the text.

        Args:
            module: as of a call.
            batch: the rows of `micro` with prompts that are not the edit.
        """
        device = self.accelerator.device
        sigma, noise = (drawn.to(device) for drawn in self.draw(batch, micro))
        batch = batch.to(device, self.dtype)
        noisy = flow.noisy_latents(batch.target, sigma, noise).to(self.dtype)
        # Each has an autocast of its own: weights that one casts without gradients would be kept for the other.
        with adapters.at_rest(self.transformer, 0.0), self.accelerator.autocast():
            own = self.family.velocity(self.transformer, noisy, sigma, batch, self.guidance)
        self._seed_dropout("dropout of preservation", batch, micro)
        with self.accelerator.autocast():
            learnt = self.family.velocity(module, noisy, sigma, batch, self.guidance)
        return (learnt.float() - own.float()).square().mean(dim=(1, 2, 3))

    def loss(self, module: nn.Module, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
        """Loss (B,) float32 of a batch on the device at noise levels (B,) and noise (B, C, H, W), float32 anywhere."""
        device = self.accelerator.device
        velocity = partial(self.family.velocity, module, batch=batch, guidance=self.guidance)
        sigma = sigma.to(device)
        with self.accelerator.autocast():
            found = flow.loss(velocity, batch.target, sigma, noise.to(device), self.weight(batch), self.measure)
        at_level = flow.level_weight(self.weighting.weighting, sigma)
        return found if at_level is None else found * at_level
