"""Frozen linear layers whose weight is stored in 8 or 4 bits.

Everything a layer holds is a parameter or a buffer of integers or float32, so that moving, offloading, copying and
saving it need to know nothing about it; the integer dtype of `weight` tells everyone else that it is quantised. They
are `nn.Linear`, so peft wraps them like any other.

Formats, with the weight of a layer as W (out, in):

- fp8: e4m3 times one float32 scale a row, W_oi ~ s_o q_oi. On cards that can, the products are computed in fp8 too.
- int8: whole numbers times one float32 scale a row, of W rotated (see `int8`). On cards that can, the products are
  computed in int8 too. What bitsandbytes stored is not rotated, and dequantised.
- nf4, fp4: 4-bit codes of bitsandbytes times one scale for each block of (64) weights (Dettmers et al. 2023, QLoRA),
  these scales stored in 8 bits ("double quantisation").

Otherwise a weight is dequantised for each product. What autograd keeps is the stored weight, never the dequantised one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.levers.int8 import (
    INT8_SIDE,
    LARGEST_INT8,
    Int8Product,
    has_int8_products,
    rotated,
    rotation_for,
    rounded_rows,
)
from qwen_image_finetune.levers.stored_precision import FOUR_BITS

E4M3 = torch.float8_e4m3fn
LARGEST = {"fp8": 448.0, "int8": LARGEST_INT8}  # finite values of e4m3, and of a symmetric int8
BLOCK = 64  # weights that share a scale in a layer quantised here; checkpoints may bring their own
SCALE_BLOCK = 256  # scales that share a scale: fixed in bitsandbytes
TINY = torch.finfo(torch.float32).tiny
FP8_SIDE = 16  # sides of the factors of an fp8 product are multiples of this (cuBLAS, CUTLASS)


class QuantizedLinear(nn.Linear):
    """A frozen `nn.Linear` of the formats above.

    Attributes:
        weight: fp8: (out, in) uint8, the bytes of e4m3 numbers (no library mistakes them for floats to cast or train).
            int8: (out, in) int8. nf4, fp4: (out * in / 2, 1) uint8, two codes a byte.
        state: names of the buffers beside it. fp8, int8: scale (out, 1) float32. int8, where it is rotated: rotation
            (block, block) int8, its signs. nf4, fp4: absmax, one a block, as float32; or as uint8 with absmax_scale,
            absmax_code and absmax_offset (float32), which make numbers of it.
        computes_in_fp8, computes_in_int8: products are computed so where the input has 16 bits.
    """

    def __init__(
        self,
        format: str,
        shape: tuple[int, int],
        weight: Tensor,
        state: dict[str, Tensor],
        bias: Tensor | None = None,
        blocksize: int = BLOCK,
        may_compute_in_8_bits: bool = True,
    ) -> None:
        super().__init__(shape[1], shape[0], bias=False, device="meta")
        self.format, self.shape, self.blocksize = format, shape, blocksize
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.state = tuple(state)
        for name, tensor in state.items():
            self.register_buffer(name, tensor)
        self.may_compute_in_8_bits = may_compute_in_8_bits
        self.will_run_on(weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the input, or autocast's."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        output: Tensor
        in_16_bits = input.dtype in (torch.bfloat16, torch.float16)
        if self.computes_in_fp8 and in_16_bits:
            output = Fp8Product.apply(input, self.weight, self.scale)
        elif self.computes_in_int8 and in_16_bits:
            output = Int8Product.apply(input, self.weight, self.scale, self.rotation)
        else:
            output = Product.apply(input, *self.stored(), (self.format, self.shape, self.blocksize))
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def stored(self) -> tuple[Tensor, ...]:
        """Weight and state, in the order that `dequantised` takes them."""
        return self.weight, *(self.get_buffer(name) for name in self.state)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers, (out, in)."""
        return dequantised(self.format, self.shape, self.blocksize, self.stored(), dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.format}"

    def will_run_on(self, device: torch.device) -> None:
        """Decide in what products are computed on a device: that of the weight, or the one which it visits for them.

        int8 without a rotation is not multiplied as it is: outliers of an activation would cost too much.
        """
        aligned = all(side % FP8_SIDE == 0 for side in self.shape)
        may = self.format == "fp8" and aligned and self.may_compute_in_8_bits
        self.computes_in_fp8 = may and has_fp8_products(device)
        aligned = all(side % INT8_SIDE == 0 for side in self.shape)
        may = "rotation" in self.state and aligned and self.may_compute_in_8_bits
        self.computes_in_int8 = may and has_int8_products(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What `.to()` and its kin call. Devices change; scales stay float32, whatever dtype the others get."""
        before = {name: self.get_buffer(name) for name in self.state}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            if self.get_buffer(name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(self.weight.device))
        self.will_run_on(self.weight.device)
        return self


def has_fp8_products(device: torch.device) -> bool:
    """Whether the card multiplies e4m3 matrices (Ada, Hopper, Blackwell)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@torch.no_grad()
def quantised(weight: Tensor, format: str, bias: Tensor | None = None) -> QuantizedLinear:
    """A layer that stores `weight` (out, in), any float dtype, on its device.

    Raises:
        ConfigError: a 4-bit format without bitsandbytes.
    """
    shape = (weight.shape[0], weight.shape[1])
    if format in FOUR_BITS:
        return QuantizedLinear(format, shape, *_four_bits(weight, format), bias=bias)
    if format == "int8":
        signs = rotation_for(shape[1], weight.device)
        stored, scale = rounded_rows(weight if signs is None else rotated(weight.float(), signs))
        state = {"scale": scale} if signs is None else {"scale": scale, "rotation": signs}
        return QuantizedLinear(format, shape, stored, state, bias)
    stored, scale = quantised_rows(weight)
    return QuantizedLinear(format, shape, stored.view(torch.uint8), {"scale": scale}, bias)


def _four_bits(weight: Tensor, format: str) -> tuple[Tensor, dict[str, Tensor]]:
    functions = bitsandbytes_functional(f"model.quantize={format!r}")
    packed, state = functions.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=format, compress_statistics=True
    )
    return packed, {
        "absmax": state.absmax,
        "absmax_scale": state.state2.absmax,
        "absmax_code": state.state2.code.clone(),
        "absmax_offset": state.offset.float(),
    }


def bitsandbytes_functional(wanted_by: str) -> Any:
    """Its functions; importing them registers its operators.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ConfigError(
            f"{wanted_by} needs bitsandbytes, which cannot be imported ({error}): "
            "pip install 'qwen-image-finetune[bitsandbytes]', or use model.quantize=fp8 or int8"
        ) from error
    return bitsandbytes.functional


def dequantised(
    format: str, shape: tuple[int, int], blocksize: int, stored: tuple[Tensor, ...], dtype: torch.dtype
) -> Tensor:
    """The weight (out, in) that `stored` means: multiplied out in float32 at least, then rounded once to `dtype`."""
    weight, *state = stored
    if format not in FOUR_BITS:
        exact = torch.promote_types(dtype, torch.float32)
        numbers = weight.view(E4M3) if format == "fp8" else weight
        plain = numbers.to(exact).mul_(state[0])
        return (plain if len(state) == 1 else rotated(plain, state[1])).to(dtype)
    operators = torch.ops.bitsandbytes
    absmax = state[0]
    if len(state) > 1:
        scale, code, offset = state[1:]
        absmax = operators.dequantize_blockwise.default(absmax, scale, code, SCALE_BLOCK, torch.float32) + offset
    known = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    numbers = operators.dequantize_4bit.default(weight, absmax, blocksize, format, shape, known)
    return numbers.to(dtype)


class Product(torch.autograd.Function):
    """y = x W^T with W dequantised for the moment, forward and for the gradient of x; W itself has no gradient.

    What is no tensor comes last: the compiler of torch 2.11 takes tensors after it for others where an input of the
    block needs no gradient, and leaves the block eager.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, *stored_and_layout: Any) -> Tensor:
        *stored, (format, shape, blocksize) = stored_and_layout
        ctx.save_for_backward(*stored)
        ctx.layout = format, shape, blocksize
        return functional.linear(input, dequantised(format, shape, blocksize, tuple(stored), input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        stored = ctx.saved_tensors
        format, shape, blocksize = ctx.layout
        gradient = gradients[0] @ dequantised(format, shape, blocksize, stored, gradients[0].dtype)
        return gradient, *(None for _ in stored), None


class Fp8Product(torch.autograd.Function):
    """The same for fp8 weights, multiplied in fp8 with one scale for each row of either factor; 16-bit input.

    Backward, x' = g W = (g * s) Q: the scales s of W's rows go into the gradient before that is quantised row by row,
    so that the stored Q serves both directions and no second copy of the weight is needed.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, row_scale = quantised_rows(input.reshape(-1, input.shape[-1]))
        output = torch._scaled_mm(
            rows, weight.view(E4M3).t(), row_scale, scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return output.to(input.dtype).view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        weight, scale = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        rows, row_scale = quantised_rows(gradient.float() * scale.view(1, -1))
        columns = weight.view(E4M3).t().contiguous().t()  # the kernels want the second factor column by column
        ones = torch.ones(1, weight.shape[1], device=weight.device)
        output = torch._scaled_mm(rows, columns, row_scale, ones, out_dtype=torch.bfloat16, use_fast_accum=True)
        return output.to(gradients[0].dtype).view(*gradients[0].shape[:-1], -1), None, None


def quantised_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 rows and their float32 scales (rows, 1)."""
    scale = (matrix.abs().amax(1, keepdim=True).float() / LARGEST["fp8"]).clamp(min=TINY)
    return (matrix.float() / scale).to(E4M3), scale
