"""A moving average of the trained weights: what a run learnt with less of its last steps' noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import Tensor

from qwen_image_finetune.config import Config, EmaConfig
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.training import trained


class Average:
    """The exponential moving average of everything that training changes, in float32.

    The first update copies the weights. After k updates the next one keeps min(decay^every, (1 + k) / (10 + k)) of the
    average: `decay` is of one step, and the warm-up, that of TensorFlow's and diffusers' averages, lets a short run
    forget where it began. Of a model that processes share, each averages its own part.

    Attributes:
        updates: how often weights were taken in; without any there is no average yet.
    """

    def __init__(self, config: Config, transformer: ModelMixin) -> None:
        self.config, self.transformer = config, transformer
        self.values = {
            name: torch.zeros_like(own, dtype=torch.float32, device=self.settings.device or own.device)
            for name, own in self._own().items()
        }
        self.updates = 0

    @property
    def settings(self) -> EmaConfig:
        """`train.ema`."""
        return self.config.train.ema

    def is_due(self, step: int) -> bool:
        """Whether weights are taken in once `step` steps are done."""
        settings = self.settings
        return step >= settings.start_step and (step - settings.start_step) % settings.every == 0

    @torch.no_grad()
    def take(self) -> None:
        """Take the weights in."""
        kept = share_kept(self.settings.decay**self.settings.every, self.updates)
        for name, weight in self._own().items():
            value = self.values[name]
            value.lerp_(weight.to(value.device, torch.float32), 1 - kept)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The transformer with the averaged weights. Both come back to the bit: they are exchanged, with the memory of
        one tensor."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        parallel.forget_gathered(self.transformer)
        for name, weight in self._own().items():
            value = self.values[name]
            if weight.dtype == torch.float32:
                before = weight.to(value.device, copy=True)
                weight.copy_(value)
                value.copy_(before)
            else:  # what a bfloat16 weight cannot hold of the average stays here, beside what the weight was
                upper, remainder = trained.halves(value)
                before = weight.to(value.device, copy=True)
                weight.copy_(upper)
                value.copy_(trained.joined(before, remainder))

    def whole(self) -> dict[str, Tensor]:
        """The average under the names of the weights, cut like them where processes share them: for a checkpoint."""
        weights = trained.weights(self.transformer, self.config.model)
        return {name: parallel.cut_as(value, weights[name]) for name, value in self.values.items()}

    def restore(self, saved: Mapping[str, Tensor], updates: int) -> None:
        """Go on with what `whole` gave, put together, to the bit.

        Raises:
            ConfigError: it is of other weights.
        """
        weights = trained.weights(self.transformer, self.config.model)
        trained.check_fit(weights, saved)
        for name, value in self.values.items():
            value.copy_(parallel.own_part(parallel.cut_like(saved[name], weights[name])))
        self.updates = updates

    def _own(self) -> dict[str, Tensor]:
        """This process's part of every trained weight, in the model's own memory."""
        weights = trained.weights(self.transformer, self.config.model)
        return {name: parallel.own_part(weight) for name, weight in weights.items()}


def share_kept(decay: float, updates: int) -> float:
    """The share of the average that stays in an update, after so many updates; nothing in the first."""
    return 0.0 if updates == 0 else min(decay, (1 + updates) / (10 + updates))
