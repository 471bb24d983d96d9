"""LoRA layers of another rank: cut to what matters most, laid together, or taken from a difference of weights.

The best matrix of rank r is that of the r largest singular values (Eckart and Young, 1936); what it leaves, in the
Frobenius norm, is the root of the sum of squares of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_image_finetune.lora.layers import Layer

OVERSAMPLED = 32  # more columns than are kept; with a few iterations the largest values are exact to float32
ITERATIONS = 4


@dataclass(frozen=True)
class Factored:
    """A layer, and what it leaves out."""

    layer: Layer
    norm: float  # of the whole change, Frobenius
    left: float  # of what the layer lacks of it

    @property
    def error(self) -> float:
        """What is left out, as a share of the whole; 0 where there is no change."""
        return self.left / self.norm if self.norm else 0.0


def resized(layer: Layer, rank: int | None = None, energy: float | None = None) -> Factored:
    """The same change in the best layer of a rank, or of the smallest rank that keeps a share of the energy.

    Args:
        rank: never more than the layer's own is made of it.
        energy: share of the sum of squared singular values, above 0 and at most 1.
    """
    # up @ down = Qu (Ru Rdᵀ) Qdᵀ: the product in the middle is as small as the rank. float64: ranks are small.
    basis_out, upper = torch.linalg.qr(layer.up.double() * layer.scale)
    basis_in, lower = torch.linalg.qr(layer.down.double().T)
    left, values, right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    kept = _kept(values, rank, energy)
    return Factored(
        _layer(basis_out @ left[:, :kept], values[:kept], right[:kept] @ basis_in.T),
        float(values.norm()),
        float(values[kept:].norm()),
    )


def extracted(change: Tensor, rank: int | None = None, energy: float | None = None) -> Factored:
    """The layer nearest to the change (out, in) of a weight, float32, on the device it is on; arguments as above.

    By rank alone a randomised decomposition is enough (Halko, Martinsson and Tropp, 2011), and what it leaves is
    measured, not estimated.
    """
    norm = float(torch.linalg.norm(change))
    limit = min(change.shape)
    if energy is None and rank is not None and rank + OVERSAMPLED < limit:
        left, values, right = torch.svd_lowrank(change, rank + OVERSAMPLED, ITERATIONS)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    kept = _kept(values, rank, energy)
    layer = _layer(left[:, :kept], values[:kept], right[:kept])
    rest = change - layer.delta().to(change.device)
    return Factored(layer, norm, float(torch.linalg.norm(rest)))


def summed(parts: Sequence[tuple[Layer, float]]) -> Layer:
    """One layer that changes its weight as all of them together, each at its strength: factors side by side, exact."""
    down = torch.cat([layer.down for layer, _ in parts])
    up = torch.cat([layer.up * (layer.scale * strength) for layer, strength in parts], dim=1)
    return Layer(down, up, float(len(down)))


def cosine(first: Layer, second: Layer) -> float:
    """Of the angle between two changes, without multiplying them out; 0 where one of them is none."""
    inner = _inner(first, second)
    lengths = (_inner(first, first) * _inner(second, second)) ** 0.5
    return inner / lengths if lengths else 0.0


def _inner(first: Layer, second: Layer) -> float:
    """<U1 D1, U2 D2> = sum of (U1ᵀ U2) * (D1 D2ᵀ), which are as small as the ranks."""
    ups = first.up.double().T @ second.up.double()
    downs = first.down.double() @ second.down.double().T
    return float((ups * downs).sum()) * first.scale * second.scale


def _kept(values: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values stay: at least one, and as many as asked for."""
    kept = len(values) if rank is None else min(rank, len(values))
    if energy is not None:
        share = values.square().cumsum(0) / values.square().sum().clamp(min=torch.finfo(values.dtype).tiny)
        # A share of 1 is reached where all that is left is rounding.
        enough = int((share < energy - 1e-12).sum()) + 1
        kept = min(kept, enough)
    return max(kept, 1)


def _layer(left: Tensor, values: Tensor, right: Tensor) -> Layer:
    """Singular values shared by both factors, whose numbers are then of one size."""
    root = values.sqrt()
    up, down = left * root, root[:, None] * right
    return Layer(down.float().cpu().contiguous(), up.float().cpu().contiguous(), float(len(values)))
