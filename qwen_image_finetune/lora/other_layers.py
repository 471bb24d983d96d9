"""What LoKr, LoHa and OFT do to the weight of one module: the mathematics, without a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from qwen_image_finetune.lora.layers import Changed


class Other(Changed):
    """What is no LoRA: read from a file by the names of its tensors."""

    parts_begin: ClassVar[str]  # these names

    @property
    def inner_rank(self) -> int | None:
        """The rank that alpha is divided by; None where no factor shows one, and alpha does not count."""
        return None

    @classmethod
    @abstractmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Other:
        """From the tensors of a file.

        Raises:
            KeyError, ValueError: one is missing, or they do not fit each other.
        """

    def scaled(self, scale: float) -> Other:
        """The same tensors with a scale in front."""
        return self


@dataclass(frozen=True)
class Kronecker(Other):
    """A LoKr (https://arxiv.org/abs/2309.14859): W + scale * w1 (x) w2, each a matrix or the product of two."""

    title: ClassVar[str] = "LoKr"
    parts_begin: ClassVar[str] = "lokr_"
    first: tuple[Tensor, ...]  # w1 (a, c), or w1_a (a, r) and w1_b (r, c)
    second: tuple[Tensor, ...]  # w2 (b, d), in the same way; out = a b, in = c d
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Of the second factor; of a whole one its longer side, as diffusers counts."""
        whole = len(self.second) == 1
        return max(self.second[0].shape) if whole else self.second[0].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.first[0].shape[0] * self.second[0].shape[0], self.first[-1].shape[1] * self.second[-1].shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As LyCORIS, peft, diffusers and ComfyUI name them."""
        return {
            f"lokr_w{number}{'' if len(factor) == 1 else ending}": tensor
            for number, factor in ((1, self.first), (2, self.second))
            for ending, tensor in zip(("_a", "_b"), factor, strict=False)
        }

    @property
    def inner_rank(self) -> int | None:
        """See `Other`."""
        return next((factor[1].shape[0] for factor in (self.second, self.first) if len(factor) == 2), None)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Kronecker:
        """See `Other`."""
        first, second = (matrices(tensors, f"lokr_w{number}") for number in (1, 2))
        found = cls(first, second)
        if found.tensors.keys() != tensors.keys():
            raise ValueError("tensors of other kinds are among them")
        return found

    def scaled(self, scale: float) -> Kronecker:
        """See `Other`."""
        return replace(self, scale=scale)

    def at_scale(self, scale: float) -> Kronecker:
        """See `Changed`."""
        *before, last = self.second
        return self if self.scale == scale else Kronecker(self.first, (*before, last * (self.scale / scale)), scale)

    def norm(self) -> Tensor:
        """The norms of both factors, multiplied."""
        first, second = (_product(factor, factor[0].device) for factor in (self.first, self.second))
        return self.scale * first.norm() * second.norm()

    def change(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """See `Changed`."""
        first, second = (_product(factor, weight.device) for factor in (self.first, self.second))
        return self.scale * torch.kron(first, second)[self.rows(weight, first_row)]


@dataclass(frozen=True)
class Hadamard(Other):
    """A LoHa (https://arxiv.org/abs/2108.06098): W + scale * (w1_a w1_b) * (w2_a w2_b), number by number."""

    title: ClassVar[str] = "LoHa"
    parts_begin: ClassVar[str] = "hada_"
    first: tuple[Tensor, Tensor]  # (out, r), (r, in)
    second: tuple[Tensor, Tensor]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Of each factor; the change has up to its square."""
        return self.first[1].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.first[0].shape[0], self.first[1].shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As LyCORIS, peft and ComfyUI name them."""
        return {
            f"hada_w{number}_{ending}": tensor
            for number, factor in ((1, self.first), (2, self.second))
            for ending, tensor in zip("ab", factor, strict=True)
        }

    @property
    def inner_rank(self) -> int:
        """See `Other`."""
        return self.rank

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Hadamard:
        """See `Other`."""
        first, second = (matrices(tensors, f"hada_w{number}") for number in (1, 2))
        if len(tensors) != 4 or len(first) != 2 or len(second) != 2:
            raise ValueError("four factors make a LoHa")
        if (first[0].shape[0], first[1].shape[1]) != (second[0].shape[0], second[1].shape[1]):
            raise ValueError("the two products are of different shapes")
        return cls(first, second)

    def scaled(self, scale: float) -> Hadamard:
        """See `Other`."""
        return replace(self, scale=scale)

    def at_scale(self, scale: float) -> Hadamard:
        """See `Changed`."""
        before, last = self.second
        return self if self.scale == scale else Hadamard(self.first, (before, last * (self.scale / scale)), scale)

    def norm(self) -> Tensor:
        """See `Changed`."""
        first, second = (_product(factor, factor[0].device) for factor in (self.first, self.second))
        return self.scale * (first * second).norm()

    def change(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """See `Changed`."""
        rows = self.rows(weight, first_row)
        first, second = (_product((left[rows], right), weight.device) for left, right in (self.first, self.second))
        return self.scale * first * second


@dataclass(frozen=True)
class Rotation(Other):
    """An OFT (https://arxiv.org/abs/2306.07280), on the side of the inputs as peft has it: W becomes W R^T.

    R is made of orthogonal blocks on the diagonal, each R = (I - Q)(I + Q)^-1 of a skew-symmetric Q (Cayley).
    """

    title: ClassVar[str] = "OFT"
    parts_begin: ClassVar[str] = "oft_"
    above: Tensor  # (blocks, b (b - 1) / 2): what stands above the diagonal of each Q, row by row

    @property
    def side(self) -> int:
        """b, of a block."""
        return (1 + isqrt(1 + 8 * self.above.shape[1])) // 2

    @property
    def rank(self) -> int:
        """Side of a block; an OFT has no rank."""
        return self.side

    @property
    def shape(self) -> tuple[None, int]:
        """(out, in) of the weight; outputs, any number, are not in it."""
        return None, len(self.above) * self.side

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As peft names it."""
        return {"oft_R.weight": self.above}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Rotation:
        """See `Other`."""
        [above] = tensors.values()
        found = cls(above)
        if above.ndim != 2 or found.side * (found.side - 1) // 2 != above.shape[1]:
            raise ValueError("not the triangles of square blocks")
        return found

    def at_scale(self, scale: float) -> Rotation:
        """Itself: a rotation has no scale."""
        return self

    def norm(self) -> None:
        """See `Changed`; lengths of rows stay."""

    def blocks(self) -> Tensor:
        """R, (blocks, b, b)."""
        side = self.side
        rows, columns = torch.triu_indices(side, side, 1)
        skew = self.above.new_zeros(len(self.above), side, side)
        skew[:, rows, columns] = self.above
        skew = skew - skew.transpose(1, 2)
        identity = torch.eye(side, dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(identity + skew, (identity - skew).expand_as(skew), left=False)

    def change(self, weight: Tensor, first_row: int = 0) -> Tensor:
        """See `Changed`."""
        pieces = weight.reshape(len(weight), -1, self.side)
        turned = torch.einsum("okc,krc->okr", pieces, self.blocks().to(weight.device))
        return turned.reshape_as(weight) - weight


def matrices(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """A matrix, or the two that it is the product of.

    Raises:
        KeyError, ValueError: one is missing, or they do not multiply.
    """
    found = (tensors[name],) if name in tensors else (tensors[f"{name}_a"], tensors[f"{name}_b"])
    if any(one.ndim != 2 or not one.numel() for one in found) or (
        len(found) == 2 and found[0].shape[1] != len(found[1])
    ):
        raise ValueError(f"{name} are no matrices that multiply")
    return found


def _product(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    first, *others = (factor.to(device) for factor in factors)
    return first if not others else first @ others[0]
