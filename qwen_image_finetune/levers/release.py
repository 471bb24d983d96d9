"""Gradient release: each weight is updated as soon as its gradient is known, and the gradient freed.

Full fine-tuning otherwise holds a gradient for every weight at the end of the backward pass. Here, hooks that run when
a gradient is complete step the optimizer for that weight alone. The result is that of an ordinary step, as long as the
optimizer treats each weight by itself and nothing looks at all gradients first (clipping, accumulation, loss scaling).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qwen_image_finetune.levers.single_steps import SingleSteps


class GradientRelease:
    """Updates weights during the backward pass.

    Attributes:
        squares: of all gradients since the last `take_norm`, summed in float32 on the device.
    """

    def __init__(self, steps: SingleSteps, parameters: Iterable[nn.Parameter]) -> None:
        self.steps = steps
        self.squares: Tensor | None = None
        for parameter in parameters:
            if steps.holds(parameter):
                parameter.register_post_accumulate_grad_hook(self._update)

    def take_norm(self) -> Tensor:
        """Norm of the gradients that were used since the last call."""
        squares, self.squares = self.squares, None
        return torch.zeros(()) if squares is None else squares.sqrt()

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        square = parameter.grad.float().square().sum()
        self.squares = square if self.squares is None else self.squares + square
        self.steps(parameter)
        parameter.grad = None
