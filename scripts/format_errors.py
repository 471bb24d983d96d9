"""Errors of the formats of model.quantize on random matrices: the tables of docs/precision.md. Any machine, seconds."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_image_finetune.levers.int8 import rounded_rows
from qwen_image_finetune.levers.quantize import BOUNDS, relative_error
from qwen_image_finetune.levers.quantized_linear import QuantizedLinear, quantised

OUTPUTS, INPUTS, ROWS = 1024, 768, 256
EIGHT_BITS = ("fp8", "int8, rotated", "int8, not rotated")


def layer(weight: Tensor, format: str) -> QuantizedLinear:
    """A layer that multiplies in its format, on whatever machine."""
    made = quantised(weight, format.partition(",")[0])
    if format == "int8, not rotated":  # by the same arithmetic, with the rotation 1
        rows, scale = rounded_rows(weight)
        state = {"scale": scale, "rotation": torch.ones(1, 1, dtype=torch.int8)}
        made = QuantizedLinear("int8", (weight.shape[0], weight.shape[1]), rows, state)
    made.computes_in_fp8, made.computes_in_int8 = made.format == "fp8", made.format == "int8"
    return made


def off(found: Tensor, exact: Tensor) -> float:
    """Relative distance."""
    return float((found.double() - exact).norm() / exact.norm())


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(OUTPUTS, INPUTS)
    errors = {format: relative_error(weight, quantised(weight, format)) for format in BOUNDS}
    print(f"{'weights':20}  " + "  ".join(f"{format} {error:.1%}" for format, error in errors.items()))

    plain, outlying = normal(ROWS, INPUTS), normal(ROWS, INPUTS)
    outlying[:, :: INPUTS // 8] *= 60
    gradient = normal(ROWS, OUTPUTS)
    gradient[:, :: OUTPUTS // 8] *= 30
    for title, input in (("inputs", plain), ("inputs with outliers", outlying)):
        exact = input.bfloat16().double() @ weight.double().T
        found = {format: off(layer(weight, format)(input.bfloat16()), exact) for format in EIGHT_BITS}
        print(f"{title:20}  " + "  ".join(f"{format} {error:.1%}" for format, error in found.items()))
    found = {}
    for format in EIGHT_BITS:
        input = plain.bfloat16().requires_grad_()
        layer(weight, format)(input).backward(gradient.bfloat16())  # type: ignore[no-untyped-call]
        assert input.grad is not None
        found[format] = off(input.grad, gradient.bfloat16().double() @ weight.double())
    print(f"{'outlying gradient':20}  " + "  ".join(f"{format} {error:.1%}" for format, error in found.items()))


if __name__ == "__main__":
    main()
