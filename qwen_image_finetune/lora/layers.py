"""What an adapter does to the weight of one module, as files and adapters hold it: the mathematics, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def kind_of(layers: Mapping[str, Layer]) -> str:
    """What kind of adapter some layers are, as it is called."""
    return "DoRA" if any(layer.magnitude is not None for layer in layers.values()) else "LoRA"


@dataclass(frozen=True)
class Layer:
    """One adapted module: W (out, in) becomes W + alpha / rank * up @ down.

    With magnitudes m (DoRA, https://arxiv.org/abs/2402.09353) every row of that has the length m_i instead of its own.
    """

    down: Tensor  # (r, in), float32; peft's lora_A
    up: Tensor  # (out, r), float32; peft's lora_B
    alpha: float
    magnitude: Tensor | None = None  # (out,), float32; peft's lora_magnitude_vector
    # (out,): m times the length of W's rows, over that of the changed ones. ComfyUI divides by the length of W's rows,
    # so this is what makes the same weights of them there (comfy/weight_adapter/base.py, weight_decompose).
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of `down`, columns of `up`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor before up @ down."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.up.shape[0], self.down.shape[1]

    def folded(self) -> Layer:
        """The same change with a scale of 1: alpha is the rank, which is what everyone takes where none is given."""
        return self if self.scale == 1 else replace(self, up=self.up * self.scale, alpha=float(self.rank))

    def with_rows(self, chosen: Callable[[Tensor], Tensor]) -> Layer:
        """The same for some outputs, or all in another order: what `chosen` makes of tensors (out, ...)."""
        lengths = [None if values is None else chosen(values) for values in (self.magnitude, self.dora_scale)]
        return Layer(self.down, chosen(self.up), self.alpha, *lengths)

    def delta(self) -> Tensor:
        """What is added to the weight, (out, in); with magnitudes, before rows get their lengths."""
        return self.scale * (self.up @ self.down)

    def change(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """float32: what a weight, or rows of it (rows, in), changes by.

        Args:
            weight: float32; looked at only with magnitudes.
            first_row: which row of the layer the first one of `weight` is.
        """
        rows, device = slice(first_row, first_row + len(weight)), weight.device
        added = self.scale * (self.up[rows].to(device) @ self.down.to(device))
        if self.magnitude is None:
            return added
        changed = weight + added
        length = torch.linalg.norm(changed, dim=1).clamp(min=TINY)
        return (self.magnitude[rows].to(device) / length)[:, None] * changed - weight
