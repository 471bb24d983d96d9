"""Products of whole numbers: weights and activations in 8 bits (W8A8), each row with one scale.

Cards multiply int8 at two to four times their 16-bit rate from Turing on (7.5), long before they have fp8. A row of an
activation has one scale for all of its numbers, so a few outlying ones would round all others away. Therefore weight
and activation are rotated before they are rounded: W R and x R, with R orthogonal, have the product that W and x have,
and R spreads each number over a block (QuaRot, Ashkboos et al. 2024). R is a Hadamard matrix in blocks; the weight is
stored rotated, and only the activation is rotated while training. Of the Hadamard matrices it is the regular one, whose
rows have all the same sum: a constant offset of the input stays one, where Sylvester's matrix would gather it in the
first number of each block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_INT8 = 127.0  # of a symmetric range
INT8_SIDE = 8  # sides of the factors are multiples of this (cuBLAS)
FEWEST_ROWS = 32  # fewer are filled up with zeros: cuBLAS wants more than 16
BLOCKS = (64, 16, 4)  # powers of four, whose square roots are powers of two: R is exact in 16 bits
TINY = torch.finfo(torch.float32).tiny


def has_int8_products(device: torch.device) -> bool:
    """Whether the card multiplies int8 matrices on its tensor cores (Turing and later)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 5)


def rotation_for(width: int, device: torch.device) -> Tensor | None:
    """Signs of the rotation of a layer with so many inputs, (block, block) int8; None where no block divides them."""
    block = next((size for size in BLOCKS if width % size == 0), None)
    if block is None:
        return None
    four = 1 - 2 * torch.eye(4, dtype=torch.int8).flip(0)  # symmetric, and every row has the sum 2
    signs = torch.ones(1, 1, dtype=torch.int8)
    while len(signs) < block:
        signs = torch.kron(signs, four)
    return signs.to(device)


def rotated(matrix: Tensor, signs: Tensor) -> Tensor:
    """(..., width), each block of it times R = signs / sqrt(block), symmetric: twice is not at all."""
    block = signs.shape[0]
    with torch.autocast(matrix.device.type, enabled=False):  # a weight in float32 is to stay so
        return (matrix.reshape(-1, block) @ (signs.to(matrix.dtype) * block**-0.5)).view(matrix.shape)


def rounded_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their float32 scales (rows, 1). A row that is not finite has a scale that is not."""
    scale = (matrix.abs().amax(1, keepdim=True).float() / LARGEST_INT8).clamp(min=TINY)
    return (matrix.float() / scale).round().to(torch.int8), scale


class Int8Product(torch.autograd.Function):
    """y = x W^T and, backward, g W; `weight` Q (out, in) int8 with W R ~ s Q, `scale` s (out, 1); 16-bit input.

    Forward, y = (x R) (s Q)^T with x R rounded row by row. Backward only the gradient of the input is needed,
    g W = ((g * s) Q) R: the scales of W's rows go into the gradient before that is rounded row by row, so the stored Q
    serves both directions.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale, signs)
        rows, row_scale = rounded_rows(rotated(input.reshape(-1, input.shape[-1]), signs))
        output = _product(rows, weight.t()) * row_scale * scale.view(1, -1)
        return output.to(input.dtype).view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        weight, scale, signs = ctx.saved_tensors
        gradient = gradients[0]
        rows, row_scale = rounded_rows(gradient.reshape(-1, weight.shape[0]).float() * scale.view(1, -1))
        columns = weight.t().contiguous().t()  # the kernels want the second factor column by column
        output = (_product(rows, columns) * row_scale).to(gradient.dtype)
        return rotated(output, signs).view(*gradient.shape[:-1], -1), None, None, None


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """The product of int8 matrices, summed in int32, as float32."""
    count = rows.shape[0]
    if count < FEWEST_ROWS:
        rows = functional.pad(rows, (0, 0, 0, FEWEST_ROWS - count))
    return torch._int_mm(rows, columns)[:count].float()
