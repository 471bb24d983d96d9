"""Quantised layers against float64: what a format may cost, forward and for the gradient of the input, and no more."""

from __future__ import annotations

import copy
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type
from torch import Tensor, nn

from qwen_image_finetune.levers import quantized_linear
from qwen_image_finetune.levers.int8 import rounded_rows
from qwen_image_finetune.levers.quantized_linear import (
    BLOCK,
    E4M3,
    FOUR_BITS,
    SCALE_BLOCK,
    QuantizedLinear,
    quantised,
    quantised_rows,
)

FORMATS = ("fp8", "int8", "nf4", "fp4")
OUT, IN = 48, 128
HALF_STEP = 2**-4  # of e4m3, relative to the number
HALF_SMALLEST_STEP = 2**-10  # of e4m3 near zero, in units of the scale


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def outliers(share: float, factor: float) -> Tensor:
    return normal(OUT, IN) * (1 + factor * (torch.rand(OUT, IN, generator=generator(1)) < share))


def scaled_columns() -> Tensor:
    weight = normal(OUT, IN)
    weight[:, ::16] *= 1e4
    return weight


def scaled_rows() -> Tensor:
    return normal(OUT, IN) * torch.logspace(-25, 25, OUT)[:, None]


def holes() -> Tensor:
    weight = normal(OUT, IN)
    weight[3] = 0
    weight[:, 5] = 0
    return weight


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: 0.02 * normal(OUT, IN),
    "heavy tails": lambda: normal(OUT, IN) / (normal(OUT, IN, seed=1).abs() + 0.01),
    "a few outliers": lambda: outliers(0.005, 1e3),
    "outlying inputs": scaled_columns,
    "outlying outputs": scaled_rows,
    "zeros": holes,
    "bfloat16": lambda: normal(OUT, IN).bfloat16(),
}
# Scales of scales span less: beside 1e25, a 4-bit block of 1e-25 rounds to zero.
FITTING = [(format, kind) for format in FORMATS for kind in WEIGHTS if format not in FOUR_BITS or "outputs" not in kind]


def largest_error(weight: Tensor, layer: QuantizedLinear) -> Tensor:
    """What the format may be off by, for each weight, float64."""
    exact = weight.double()
    if layer.format == "fp8":
        return torch.maximum(HALF_STEP * exact.abs(), HALF_SMALLEST_STEP * layer.scale.double())
    if layer.format == "int8":
        return layer.scale.double().expand_as(exact) / 2
    blocks = exact.view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    codes = get_4bit_type(layer.format, "cpu").double().sort().values
    scale_codes = create_dynamic_map().double().sort().values  # bitsandbytes' 8-bit code, of scales less their mean
    assert absmax.numel() <= SCALE_BLOCK
    of_scale = scale_codes.diff().max() / 2 * (absmax - absmax.mean()).abs().max()
    return (codes.diff().max() / 2 * absmax + of_scale).expand_as(blocks).reshape(exact.shape)


def by_hand(matrix: Tensor) -> Tensor:
    """Blocks of 64 numbers times the regular Hadamard matrix, float64."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double() / 2
    rotation = torch.kron(four, torch.kron(four, four))
    assert torch.equal(rotation @ rotation.T, torch.eye(64).double())
    return torch.cat([block @ rotation for block in matrix.double().split(64, dim=1)], dim=1)


@pytest.mark.parametrize(("format", "kind"), FITTING)
def test_weights_are_off_by_no_more_than_the_format_implies(format: str, kind: str) -> None:
    weight = WEIGHTS[kind]()
    layer = quantised(weight, format)
    found, exact = layer.dequantised(torch.float64), weight.double()
    if format == "int8":  # it is rounded as it is rotated, by hand here
        found, exact = (by_hand(matrix) for matrix in (found, exact))
    error = (found - exact).abs()
    bound = largest_error(weight, layer)
    assert bool((error <= bound * (1.001 if format == "int8" else 1.0001)).all())  # a rotation in float32 before
    assert float((error / bound.clamp(min=1e-300)).max()) > 0.3, "the bound would not notice an error"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_products_are_those_of_the_stored_weight(format: str, dtype: torch.dtype) -> None:
    """Nothing but rounding to the dtype of the input is lost on top of the weight's own error, in both directions."""
    layer = quantised(normal(OUT, IN), format, bias=normal(OUT))
    input = normal(3, 7, IN).to(dtype).requires_grad_()
    gradient = normal(3, 7, OUT, seed=2).to(dtype)
    output = layer(input)
    output.backward(gradient)
    assert output.dtype == dtype
    assert input.grad is not None
    assert layer.bias is not None
    stored = layer.dequantised(torch.float64)
    rounding = torch.finfo(dtype).eps
    for got, left, right in (
        (output.double() - layer.bias.double(), input.detach().double(), stored.T),
        (input.grad.double(), gradient.double(), stored),
    ):
        # weight and result rounded once each, sums accumulated in float32 or wider, the bias added in the dtype
        bound = 3 * rounding * (left.abs() @ right.abs()) + 4 * rounding
        assert bool(((got - left @ right).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "a few outliers", "zeros"])
def test_products_in_fp8(kind: str, dtype: torch.dtype) -> None:
    """Both factors rounded to e4m3 row by row, forward and backward; rows of very different size share nothing."""
    weight = WEIGHTS[kind]()
    layer = quantised(weight, "fp8")
    layer.computes_in_fp8 = True
    sizes = torch.logspace(-4, 0, 10)[:, None]
    input = (normal(10, IN) * sizes).to(dtype).requires_grad_()
    gradient = (normal(10, OUT, seed=2) * sizes).to(dtype)
    output = layer(input)
    output.backward(gradient)
    assert input.grad is not None
    assert output.dtype == input.grad.dtype == dtype
    scale, stored = layer.scale.double(), layer.dequantised(torch.float64)
    for got, left, right in (
        (output, input.detach().double(), stored.T),
        (input.grad, gradient.double() * scale.T, stored / scale),
    ):
        row_scale = left.abs().amax(1, keepdim=True) / 448
        rounded = torch.maximum(HALF_STEP * left.abs(), HALF_SMALLEST_STEP * row_scale)
        exact = left @ right
        smallest = torch.finfo(dtype).eps * torch.finfo(dtype).tiny
        bound = 1.001 * rounded @ right.abs() + 2**-7 * exact.abs() + smallest  # the result is rounded to bfloat16
        error = (got.double() - exact).abs()
        assert bool((error <= bound).all())
    # Errors of single weights and inputs average out: 3.7 % of a typical result are left, against 2.6 % for the weight.
    exact = input.detach().double() @ weight.double().T
    relative = (output.detach().double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(relative.max()) < 0.06


def test_products_in_fp8_equal_the_emulated_ones() -> None:
    """The kernel against the same rounding written out in float64."""
    layer = quantised(normal(OUT, IN), "fp8")
    layer.computes_in_fp8 = True
    input = normal(5, IN, seed=3).bfloat16().requires_grad_()
    gradient = normal(5, OUT, seed=4).bfloat16()
    output = layer(input)
    output.backward(gradient)
    stored, scale = layer.weight.view(E4M3).double(), layer.scale.double()
    rows, row_scale = quantised_rows(input.detach())
    assert torch.allclose(output.double(), row_scale * (rows.double() @ stored.T) * scale.T, rtol=2**-7, atol=1e-4)
    rows, row_scale = quantised_rows(gradient.float() * layer.scale.T)
    assert input.grad is not None
    assert torch.allclose(input.grad.double(), row_scale.double() * (rows.double() @ stored), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 41])
def test_products_in_int8_equal_the_emulated_ones(rows: int) -> None:
    """The kernel against the same rounding written out in float64, for few rows (which are filled up) and many."""
    layer = quantised(normal(OUT, IN), "int8", bias=normal(OUT))
    layer.computes_in_int8 = True
    input = normal(rows, IN, seed=3).bfloat16().requires_grad_()
    gradient = normal(rows, OUT, seed=4).bfloat16()
    output = layer(input)
    output.backward(gradient)
    assert input.grad is not None
    assert layer.bias is not None
    assert output.dtype == input.grad.dtype == torch.bfloat16
    stored, scale = layer.weight.double(), layer.scale.double()
    forward = by_hand(input.detach()).bfloat16()
    row_scale = forward.abs().amax(1, keepdim=True).double() / 127
    whole = (forward.double() / row_scale).round()
    expected = (row_scale * (whole @ stored.T) * scale.T).bfloat16() + layer.bias.bfloat16()
    assert relative(output, expected) < 2e-3, "a number on the edge may be rounded to the other side"
    backward = gradient.double() * scale.T
    row_scale = backward.abs().amax(1, keepdim=True) / 127
    whole = (backward / row_scale).round()
    assert relative(input.grad, by_hand((row_scale * (whole @ stored)).bfloat16())) < 4e-3


def relative(found: Tensor, exact: Tensor) -> float:
    exact = exact.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm())


def test_a_rotation_guards_int8_against_outliers() -> None:
    """Of the activation, as transformers have them. Sylvester's matrix would make outliers of an offset."""
    weight = 0.02 * normal(OUT, 768)
    plain, outlying = normal(64, 768, seed=5), normal(64, 768, seed=5)
    outlying[:, ::97] *= 60
    errors: dict[str, float] = {}
    for name, input in (("plain", plain), ("outlying", outlying), ("offset", plain.abs() + 2)):
        for rotated in (True, False):
            layer = quantised(weight, "int8")
            if not rotated:  # by the same arithmetic, R = 1
                rows, scale = rounded_rows(weight)
                signs = torch.ones(1, 1, dtype=torch.int8)
                layer = QuantizedLinear("int8", (OUT, 768), rows, {"scale": scale, "rotation": signs})
            layer.computes_in_int8 = True
            exact = input.bfloat16().double() @ weight.double().T
            errors[f"{name} {'rotated' if rotated else 'as it is'}"] = relative(layer(input.bfloat16()), exact)
    assert errors["plain rotated"] < 0.013
    assert errors["offset rotated"] < 0.013
    assert errors["outlying rotated"] < 0.013 < 0.035 < errors["outlying as it is"], errors


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so_in_int8(value: float) -> None:
    """Whole numbers know neither: the gradient scaler and the guards of a step must still see it."""
    layer = quantised(normal(OUT, IN), "int8")
    layer.computes_in_int8 = True
    input = normal(2, IN).bfloat16()
    input[1, 7] = value
    input.requires_grad_()
    output = layer(input)
    assert not output[1].isfinite().any()
    gradient = torch.ones_like(output)
    gradient[0, 3] = value
    output.backward(gradient)
    assert input.grad is not None
    assert not input.grad[0].isfinite().any()
    assert input.grad[1].isfinite().all()


def test_autograd_keeps_the_stored_weight_alone() -> None:
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for format in FORMATS:
        for in_8_bits in (False, True) if format in ("fp8", "int8") else (False,):
            layer = quantised(normal(OUT, IN), format)
            layer.computes_in_fp8, layer.computes_in_int8 = (
                in_8_bits and format == "fp8",
                in_8_bits and format == "int8",
            )
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                layer(normal(4, IN).bfloat16().requires_grad_())
            assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in layer.stored()}


@pytest.mark.parametrize("code", FOUR_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_equal_bitsandbytes(code: str, dtype: torch.dtype) -> None:
    weight = normal(OUT, IN).to(dtype)
    theirs = bitsandbytes.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=dtype, quant_type=code)
    theirs.weight = bitsandbytes.nn.Params4bit(weight.clone(), quant_type=code).to("cpu")
    first, second = normal(5, IN).to(dtype).requires_grad_(), normal(5, IN).to(dtype).requires_grad_()
    ours = quantised(weight, code)
    assert torch.equal(ours(first), theirs(second))
    ours(first).square().sum().backward()
    theirs(second).square().sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert torch.equal(first.grad, second.grad)


@pytest.mark.parametrize("format", FORMATS)
def test_casting_a_model_leaves_what_is_stored(format: str) -> None:
    model = nn.Sequential(quantised(normal(OUT, IN), format, bias=normal(OUT)), nn.LayerNorm(OUT))
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model.to(torch.bfloat16).half().double()
    after = layer.state_dict()
    assert before.pop("bias").dtype == torch.float32
    assert after.pop("bias").dtype == torch.float64
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("format", FORMATS)
def test_state_and_copies_compute_the_same_bits(format: str) -> None:
    first, second = (quantised(normal(OUT, IN, seed=seed), format, bias=normal(OUT, seed=seed)) for seed in (0, 1))
    input = normal(4, IN)
    expected = first(input)
    assert not torch.equal(second(input), expected)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(input), expected)
    assert torch.equal(copy.deepcopy(first)(input), expected)
    assert torch.equal(first.eval()(input), expected), "training and evaluation are the same arithmetic"


def test_autocast_decides_the_precision() -> None:
    """As for any linear layer: norms hand on float32 under autocast, and products are to be taken in 16 bits."""
    layer = quantised(normal(OUT, IN), "int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(normal(4, IN)).dtype == torch.bfloat16
    assert layer(normal(4, IN)).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "format", "allowed", "expected"),
    [((48, 128), "fp8", True, True), ((48, 120), "fp8", True, False), ((40, 128), "fp8", True, False),
     ((48, 128), "fp8", False, False), ((48, 128), "int8", True, False)],
)  # fmt: skip
def test_which_layers_compute_in_fp8_on_a_card_that_can(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], format: str, allowed: bool, expected: bool
) -> None:
    layer = quantised(normal(*shape), format)
    assert not layer.computes_in_fp8, "this machine cannot"
    monkeypatch.setattr(quantized_linear, "has_fp8_products", lambda device: True)
    layer.may_compute_in_8_bits = allowed
    layer.to("cpu")
    assert layer.computes_in_fp8 == expected


@pytest.mark.parametrize(
    ("shape", "rotated", "expected"),
    [((48, 128), True, True), ((48, 36), True, False), ((44, 128), True, False), ((48, 128), False, False)],
)
def test_which_layers_compute_in_int8_on_a_card_that_can(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rotated: bool, expected: bool
) -> None:
    layer = quantised(normal(*shape), "int8")
    if not rotated:  # as bitsandbytes stores them
        layer = QuantizedLinear("int8", shape, layer.weight.data, {"scale": layer.scale})
    assert not layer.computes_in_int8, "this machine cannot"
    monkeypatch.setattr(quantized_linear, "has_int8_products", lambda device: True)
    layer.to("cpu")
    assert layer.computes_in_int8 == expected
    assert not layer.computes_in_fp8


def test_a_layer_may_run_elsewhere_than_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_linear, "has_fp8_products", lambda device: device.type == "cuda")
    layer = quantised(normal(48, 128), "fp8")
    layer.will_run_on(torch.device("cuda"))
    assert layer.computes_in_fp8
    layer.to("cpu")
    assert not layer.computes_in_fp8


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_equals_eager(format: str) -> None:
    """Without a break in the graph; float32 sums may be taken in another order. int8 as a card computes it."""
    inner = quantised(normal(OUT, IN), format, bias=normal(OUT))
    inner.computes_in_int8 = format == "int8"
    layer = nn.Sequential(inner, nn.GELU())
    compiled = torch.compile(layer, fullgraph=True)
    dtype = torch.bfloat16 if format == "int8" else torch.float32
    inputs = [normal(4, IN).to(dtype).requires_grad_() for _ in range(2)]
    outputs = [layer(inputs[0]), compiled(inputs[1])]
    for output in outputs:
        output.square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    if format == "int8":  # eager rounds to bfloat16 on the way
        assert relative(outputs[1], outputs[0]) < 8e-3
        assert relative(inputs[1].grad, inputs[0].grad) < 2e-2
        torch.compiler.reset()
        return
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-3)
    torch.compiler.reset()
