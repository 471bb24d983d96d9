"""What an adapter does to the weight of one module, as files and adapters hold it: the mathematics, without a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


class Changed(ABC):
    """One adapted module, whose weight W (out, in) becomes W + `change`. Tensors are float32."""

    title: ClassVar[str]  # what such an adapter is called

    @property
    @abstractmethod
    def rank(self) -> int:
        """Of the adapter, as model.lora.r counts it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int | None, int]:
        """(out, in) of the weight; None where it fits any."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by the names of files; only of a layer that is `folded`."""

    @abstractmethod
    def at_scale(self, scale: float) -> Changed:
        """The same change by other tensors, in front of which stands this scale."""

    @abstractmethod
    def norm(self) -> Tensor | None:
        """() Frobenius norm of the change, of a DoRA's before rows get lengths; None where the weight decides it."""

    @abstractmethod
    def change(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """float32: what a weight, or rows of it (rows, in), changes by.

        Args:
            weight: float32; some kinds do not look at it.
            first_row: which row of the layer the first one of `weight` is.
        """

    def folded(self) -> Changed:
        """The same change with a scale of 1, which is what everyone takes where none is given."""
        return self.at_scale(1.0)

    def rows(self, weight: Tensor, first_row: int) -> slice:
        """The rows of the layer that `weight` has."""
        return slice(first_row, first_row + len(weight))


def kind_of(layers: Mapping[str, Changed]) -> str:
    """What an adapter of these layers is called: DoRA where one has magnitudes."""
    titles = {"DoRA" if isinstance(one, Layer) and one.magnitude is not None else one.title for one in layers.values()}
    return "DoRA" if "DoRA" in titles else min(titles)


@dataclass(frozen=True)
class Layer(Changed):
    """A LoRA: W + alpha / rank * up @ down.

    With magnitudes m (DoRA, https://arxiv.org/abs/2402.09353) every row of that has the length m_i instead of its own.
    """

    title: ClassVar[str] = "LoRA"
    down: Tensor  # (r, in); peft's lora_A
    up: Tensor  # (out, r); peft's lora_B
    alpha: float
    magnitude: Tensor | None = None  # (out,); peft's lora_magnitude_vector
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

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Under peft's names. A DoRA has its magnitudes as peft and diffusers name them, and as ComfyUI takes them;
        each drops or passes over the others'. `dora_scale` alone, as LyCORIS writes it, is the magnitudes themselves.
        """
        found = {"lora_A.weight": self.down, "lora_B.weight": self.up}
        if self.magnitude is not None and self.dora_scale is not None:
            return {**found, "lora_magnitude_vector": self.magnitude, "dora_scale": self.dora_scale[:, None]}
        return found if self.magnitude is None else {**found, "dora_scale": self.magnitude[:, None]}

    def folded(self) -> Layer:
        """The same change with a scale of 1: alpha is the rank, which is what everyone takes where none is given."""
        return self.at_scale(1.0)

    def at_scale(self, scale: float) -> Layer:
        """See `Changed`."""
        if self.scale == scale:
            return self
        return replace(self, up=self.up * (self.scale / scale), alpha=scale * self.rank)

    def norm(self) -> Tensor:
        """From products as small as the rank: |B A|^2 = sum (B^T B) * (A A^T)."""
        squared = ((self.up.T @ self.up) * (self.down @ self.down.T)).sum()
        return self.scale * squared.clamp(min=0).sqrt()

    def with_rows(self, chosen: Callable[[Tensor], Tensor]) -> Layer:
        """The same for some outputs, or all in another order: what `chosen` makes of tensors (out, ...)."""
        lengths = [None if values is None else chosen(values) for values in (self.magnitude, self.dora_scale)]
        return Layer(self.down, chosen(self.up), self.alpha, *lengths)

    def delta(self) -> Tensor:
        """What is added to the weight, (out, in); with magnitudes, before rows get their lengths."""
        return self.scale * (self.up @ self.down)

    def change(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """See `Changed`."""
        rows, device = self.rows(weight, first_row), weight.device
        added = self.scale * (self.up[rows].to(device) @ self.down.to(device))
        if self.magnitude is None:
            return added
        changed = weight + added
        length = torch.linalg.norm(changed, dim=1).clamp(min=TINY)
        return (self.magnitude[rows].to(device) / length)[:, None] * changed - weight
