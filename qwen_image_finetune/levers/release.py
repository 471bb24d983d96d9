"""Gradient release: each weight is updated as soon as its gradient is known, and the gradient freed.

Full fine-tuning otherwise holds a gradient for every weight at the end of the backward pass. Here, hooks that run when
a gradient is complete step the optimizer for that weight alone. The result is that of an ordinary step, as long as the
optimizer treats each weight by itself and nothing looks at all gradients first (clipping, accumulation, loss scaling).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class GradientRelease:
    """Updates weights during the backward pass.

    Attributes:
        squares: of all gradients since the last `take_norm`, summed in float32 on the device.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.squares: Tensor | None = None
        self._groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in parameters:
            if id(parameter) in self._groups:
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
        everything = self.optimizer.param_groups
        group = self._groups[id(parameter)]
        members = group["params"]
        try:  # for this moment the optimizer has one weight
            group["params"] = [parameter]
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        finally:
            group["params"], self.optimizer.param_groups = members, everything
        parameter.grad = None
