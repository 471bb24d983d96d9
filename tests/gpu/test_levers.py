"""What only a card can show: fp8 products, attention kernels, compiled blocks, copies on streams of their own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from qwen_image_finetune import levers
from qwen_image_finetune.config import Config
from qwen_image_finetune.levers.attention import attend, choose
from qwen_image_finetune.levers.compile import compilation_of
from qwen_image_finetune.levers.int8 import has_int8_products
from qwen_image_finetune.levers.offload import Offloaded
from qwen_image_finetune.levers.quantize import quantize
from qwen_image_finetune.levers.quantized_linear import FOUR_BITS, has_fp8_products, quantised
from qwen_image_finetune.levers.swap import swap_blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CARD = torch.device("cuda", 0)
HEAD = {"attention_head_dim": 128, "num_attention_heads": 4, "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 64}
TOKENS, TEXT = 1045, 77  # no multiple of anything
FAMILIES = ["flux", "qwen"]


def relative(found: Tensor, exact: Tensor) -> float:
    assert bool(torch.isfinite(found).all())
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def transformer(family: str) -> Any:
    torch.manual_seed(1)
    with CARD:
        model: Any = (
            FluxTransformer2DModel(
                num_layers=2, num_single_layers=2, pooled_projection_dim=32, guidance_embeds=True, **HEAD
            )
            if family == "flux"
            else QwenImageTransformer2DModel(num_layers=3, **HEAD)
        )
    return model.to(torch.bfloat16).requires_grad_(False)


def inputs(model: Any, rows: int = 1) -> dict[str, Any]:
    generator = torch.Generator(CARD).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=CARD, dtype=torch.bfloat16)

    side = TOKENS // 19
    found: dict[str, Any] = {
        "hidden_states": normal(rows, TOKENS, 64),
        "encoder_hidden_states": normal(rows, TEXT, 64),
        "timestep": torch.full((rows,), 0.4, device=CARD),
        "return_dict": False,
    }
    if isinstance(model, FluxTransformer2DModel):
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(19.0), torch.arange(float(side))).to(CARD)
        found |= {"pooled_projections": normal(rows, 32), "guidance": torch.ones(rows, device=CARD)}
        return found | {"img_ids": ids, "txt_ids": torch.zeros(TEXT, 3, device=CARD)}
    return found | {"img_shapes": [[(1, 19, side)]] * rows}


def prepared(family: str, quantised_as: str | None = None, **train: Any) -> Any:
    model = transformer(family)
    if quantised_as:
        quantize(model, quantised_as)
    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": "x", "quantize": quantised_as or False,
                      "lora": {"r": 8, "lora_alpha": 8, "init_lora_weights": "gaussian"}},
            "train": {"trainer": "FluxKontext" if family == "flux" else "QwenImageEdit", **train},
        }
    )  # fmt: skip
    levers.prepare(model, config, CARD)
    generator = torch.Generator(CARD).manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator, device=CARD)
    return model.train()


def gradients(model: Any) -> dict[str, Tensor]:
    with torch.autocast("cuda", torch.bfloat16):
        output = model(**inputs(model))[0]
    output.float().square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) > 10
    model.zero_grad()
    return {"output": output.detach(), **found}


def farthest(model: Any, other: Any) -> float:
    one, two = gradients(model), gradients(other)
    assert one.keys() == two.keys()
    return max(relative(one[name], two[name]) for name in one)


PLAIN: dict[str, Any] = {"gradient_checkpointing": False, "attention": "flash"}


@pytest.mark.parametrize("format", ["fp8", "int8", *FOUR_BITS])
@pytest.mark.parametrize("compiled", [False, True])
def test_products(format: str, compiled: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 768, device=CARD, dtype=torch.bfloat16)
    weight[:, ::97] *= 20  # outliers
    layer = quantised(weight, format)
    assert layer.computes_in_fp8 == (format == "fp8" and has_fp8_products(CARD))
    run: Any = torch.compile(layer) if compiled else layer
    x = torch.randn(3, 211, 768, device=CARD, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn(3, 211, 1024, device=CARD, dtype=torch.bfloat16)
    output = run(x)
    output.backward(slope)
    exact = layer.dequantised(torch.float64)
    assert layer.computes_in_int8 == (format == "int8" and has_int8_products(CARD))
    bound = {"fp8": 0.04, "int8": 0.02}.get(format, 6e-3)  # two factors rounded to 4 significant bits; bf16 alone
    assert relative(output, x.detach().double() @ exact.T) < bound
    assert x.grad is not None
    assert relative(x.grad, slope.double() @ exact) < bound


@pytest.mark.parametrize("tokens", [1, 130, 1045])
@pytest.mark.parametrize("name", ["flash4", "flash", "efficient", "math"])
def test_attention_equals_float64(name: str, tokens: int) -> None:
    if name == "flash4" and choose("auto", CARD, torch.bfloat16) != "flash4":
        pytest.skip("flash-attn-4 is not installed, or this card is older than it supports")
    generator = torch.Generator(CARD).manual_seed(tokens)
    tensors = [torch.randn(2, tokens, 3, 128, generator=generator, device=CARD, dtype=torch.bfloat16) for _ in range(4)]
    query, key, value = (tensor.requires_grad_() for tensor in tensors[:3])
    output = attend(query, key, value, None, name)
    found = [output, *torch.autograd.grad(output, (query, key, value), tensors[3])]
    exact = [tensor.detach().double().transpose(1, 2).requires_grad_() for tensor in (query, key, value)]
    expected = ((exact[0] @ exact[1].transpose(-1, -2)) / 128**0.5).softmax(-1) @ exact[2]
    wanted = [expected, *torch.autograd.grad(expected, exact, tensors[3].double().transpose(1, 2))]
    for one, two in zip(found, wanted, strict=True):
        if float(two.detach().norm()) > 1e-6:  # of a single token, query and key have no gradient
            assert relative(one.detach(), two.detach().transpose(1, 2)) < 8e-3


@pytest.mark.parametrize("name", ["flash4", "flash"])
def test_masked_attention_equals_float64(name: str) -> None:
    if name == "flash4" and choose("auto", CARD, torch.bfloat16) != "flash4":
        pytest.skip("flash-attn-4 is not installed, or this card is older than it supports")
    query, key, value = (torch.randn(2, 77, 3, 128, device=CARD, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(2, 1, 1, 77, dtype=torch.bool, device=CARD)
    mask[0, ..., 40:] = False
    exact = [tensor.double().transpose(1, 2) for tensor in (query, key, value)]
    scores = (exact[0] @ exact[1].transpose(-1, -2) / 128**0.5).masked_fill(~mask, -torch.inf)
    assert relative(attend(query, key, value, mask, name), (scores.softmax(-1) @ exact[2]).transpose(1, 2)) < 8e-3


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Flash attention's backward adds in any order otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("format", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_saves_memory_changes_no_bit(family: str, format: str | None) -> None:
    plain = gradients(prepared(family, format, **PLAIN))
    ways: list[dict[str, Any]] = [
        {"keep_activations": "none"},
        {"keep_activations": 0.0},
        {"keep_activations": 0.5},
        {"keep_activations": "none", "blocks_to_swap": 2},
        {"keep_activations": 0.0, "offload_activations": True},
    ]
    for way in ways:
        model = prepared(family, format, gradient_checkpointing=True, attention="flash", **way)
        for _ in range(2):  # copies that are late would show in the second step
            found = gradients(model)
            wrong = [name for name in plain if not torch.equal(plain[name], found[name])]
            assert not wrong, (way, wrong[:3])


def test_host_memory_is_unlocked_with_the_end_of_a_run() -> None:
    for _ in range(2):
        model = transformer("flux")
        swap = swap_blocks(model, 2, CARD)
        with torch.no_grad():
            model(**inputs(model))  # copies may still be on their way
        hosts = [block.host for block in swap.waiting.values()]
        assert [host.is_pinned() for host in hosts] == [True, True]
        del model, swap
        gc.collect()
        assert [host.is_pinned() for host in hosts] == [False, False]


def test_a_copy_that_nobody_takes_ends_before_its_memory_is_used_again() -> None:
    """As after an exception in the backward pass."""
    activation = torch.ones(1 << 28, device=CARD, dtype=torch.uint8)
    saved = Offloaded(activation, torch.Stream(CARD), None)
    torch.accelerator.synchronize()
    saved.fetch()
    assert saved.returned is not None
    memory = saved.returned.data_ptr()
    del saved
    other = torch.zeros_like(activation)
    assert other.data_ptr() == memory, "what this is about"
    torch.accelerator.synchronize()
    assert not other.any()


@pytest.mark.parametrize("keep", [None, "none", 0.0, 0.5])
@pytest.mark.parametrize("format", [None, "fp8", "int8"])
def test_compiled_equals_eager(format: str | None, keep: Any) -> None:
    recomputed = {"gradient_checkpointing": False} if keep is None else {"keep_activations": keep}
    compiled = prepared("flux", format, **{"gradient_checkpointing": True, **recomputed}, compile=True)
    assert farthest(compiled, prepared("flux", format, **PLAIN)) < (0.1 if format else 0.03)
    compilation = compilation_of(compiled)
    assert compilation is not None
    assert compilation.num_graphs > 0
    torch._dynamo.reset()


def test_compiled_and_offloaded_equals_compiled() -> None:
    train = {"gradient_checkpointing": True, "keep_activations": 0.0, "compile": True}
    assert farthest(prepared("flux", "nf4", **train, offload_activations=True), prepared("flux", "nf4", **train)) < 0.02
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [1, 17, 211])
def test_products_in_int8_of_few_rows(rows: int) -> None:
    """cuBLAS takes more than 16; the modulation layers of a batch of one have a single one."""
    layer = quantised(torch.randn(1024, 768, device=CARD), "int8")
    x = torch.randn(rows, 768, device=CARD, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().sum().backward()
    assert relative(layer(x).detach(), x.detach().double() @ layer.dequantised(torch.float64).T) < 0.02
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_8_bits_are_near_bf16(family: str, format: str) -> None:
    assert relative(gradients(prepared(family, format, **PLAIN))["output"],
                    gradients(prepared(family, None, **PLAIN))["output"]) < 0.08  # fmt: skip


def test_a_module_of_fp8_moves_between_host_and_card() -> None:
    layer = quantised(torch.randn(64, 64), "fp8")
    assert not layer.computes_in_fp8
    holder = nn.Sequential(layer).to(CARD)
    assert layer.computes_in_fp8 == has_fp8_products(CARD)
    holder.to("cpu")
    assert not layer.computes_in_fp8
