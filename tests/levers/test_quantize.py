"""Which layers are quantised, how their errors are measured, and what becomes of those that do not fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import disturb, forward, run, tiny_transformer
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError, LoraConfig
from qwen_image_finetune.levers.quantize import (
    BOUNDS,
    candidates,
    quantization_errors,
    quantize,
    relative_error,
)
from qwen_image_finetune.levers.quantized_linear import QuantizedLinear, quantised
from qwen_image_finetune.lora import adapters

FORMATS = ("fp8", "int8", "nf4", "fp4")
FAMILIES = ("flux", "qwen")
# Linear layers outside the blocks.
OUTSIDE = {
    "flux": {"x_embedder", "context_embedder", "norm_out.linear", "proj_out"}
    | {f"time_text_embed.{part}_embedder.linear_{n}" for part in ("timestep", "guidance", "text") for n in (1, 2)},
    "qwen": {"img_in", "txt_in", "norm_out.linear", "proj_out"}
    | {f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)},
}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def dequantised_double(model: Any) -> Any:
    """The same model in float64, its quantised layers plain ones with the weights that are stored."""
    for name, layer in linear_layers(model).items():
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantised(torch.float64), requires_grad=False)
            plain.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_inside_blocks_are_quantised_modulation_included(family: str) -> None:
    model = tiny_transformer(family)
    report = quantize(model, "fp8")
    plain = {name for name, layer in linear_layers(model).items() if not isinstance(layer, QuantizedLinear)}
    assert plain == OUTSIDE[family]
    assert report.num_linear - report.num_quantised == len(plain)
    modulation = "norm1.linear" if family == "flux" else "img_mod.1"
    assert isinstance(model.get_submodule(f"transformer_blocks.0.{modulation}"), QuantizedLinear)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_output_stays_near(family: str, format: str) -> None:
    model = tiny_transformer(family)
    exact = run(model)
    quantize(model, format)
    error = float((run(model) - exact).norm() / exact.norm())
    assert 0 < error < {"fp8": 0.1, "int8": 0.05, "nf4": 0.35, "fp4": 0.45}[format]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_an_adapter_are_those_of_the_stored_weights(family: str, format: str) -> None:
    """Through every quantised layer, against the same network in float64."""
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="gaussian")
    gradients: list[dict[str, Tensor]] = []
    for exact in (False, True):
        model = tiny_transformer(family)
        quantize(model, format)
        if exact:
            dequantised_double(model)
        adapters.add_adapter(model, lora, seed=1)
        disturb(model)
        if exact:
            model.double()
        forward(model).double().square().sum().backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    quantised_base, reference = gradients
    assert quantised_base.keys() == reference.keys()
    assert len(reference) > 60
    for name, gradient in reference.items():
        error = (quantised_base[name.replace(".base_layer", "")] - gradient).norm()
        assert float(error) <= 2e-4 * float(gradient.norm()), name


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_an_adapter_with_products_in_8_bits(family: str, format: str) -> None:
    """All products of the base so, forward and backward: gradients point where those of full precision do."""
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="gaussian")
    gradients: list[Tensor] = []
    for in_8_bits in (True, False):
        model = tiny_transformer(family, torch.bfloat16)
        if in_8_bits:
            quantize(model, format)
            layers = [layer for layer in linear_layers(model).values() if isinstance(layer, QuantizedLinear)]
            for layer in layers:
                layer.computes_in_fp8, layer.computes_in_int8 = format == "fp8", "rotation" in layer.state
        adapters.add_adapter(model, lora, seed=1)
        with torch.autocast("cpu", torch.bfloat16):
            forward(model).float().square().sum().backward()
        found = [p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.98
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.2


def test_error_is_that_of_an_output_to_which_inputs_contribute_equally() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    weight[:, ::16] *= 1e3
    layer = quantised(weight, "int8")
    input = torch.randn(20_000, 128, generator=generator) / weight.norm(dim=0)
    exact = input @ weight.T
    measured = (layer(input) - exact).norm() / exact.norm()
    assert relative_error(weight, layer) == pytest.approx(float(measured), rel=0.02)
    plain = (layer.dequantised(torch.float32) - weight).norm() / weight.norm()
    assert plain < 0.01 < 0.5 < measured, "the plain norm does not see what is lost"


@pytest.mark.parametrize(("format", "error"), [("fp8", 0.0265), ("int8", 0.0085), ("nf4", 0.0921), ("fp4", 0.1219)])
def test_gaussian_weights_are_well_below_the_bound(format: str, error: float) -> None:
    weight = torch.randn(512, 3072, generator=torch.Generator().manual_seed(0))
    found = relative_error(weight, quantised(weight, format))
    assert found == pytest.approx(error, rel=0.03)
    assert 1.6 * found < BOUNDS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_what_does_not_fit_stays_as_it_is_and_is_named(format: str) -> None:
    model = tiny_transformer("flux")
    with torch.no_grad():
        model.transformer_blocks[1].attn.to_k.weight[:, 3] *= 1e8  # the others round to nothing beside it
        model.single_transformer_blocks[0].proj_mlp.weight[0, 0] = math.nan
    before = model.transformer_blocks[1].attn.to_k.weight.clone()
    errors = dict(quantization_errors(model, format))
    report = quantize(model, format)
    names = ["single_transformer_blocks.0.proj_mlp", "transformer_blocks.1.attn.to_k"]
    assert [name for name, _ in report.kept] == names, "what is no number comes first"
    for name in names:
        assert type(model.get_submodule(name)) is nn.Linear
    assert torch.equal(model.transformer_blocks[1].attn.to_k.weight, before)
    assert "transformer_blocks.1.attn.to_k (" in report.words()
    assert report.num_linear - report.num_quantised == len(OUTSIDE["flux"]) + 2
    assert errors["transformer_blocks.1.attn.to_k"] == dict(report.kept)["transformer_blocks.1.attn.to_k"]
    assert math.isnan(errors["single_transformer_blocks.0.proj_mlp"])


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_is_measured_like_the_model_in_memory(format: str, tmp_path: Path) -> None:
    model = tiny_transformer("qwen")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole = quantization_errors(tmp_path, format)
    assert whole == quantization_errors(model, format)
    assert [error for _, error in whole] == sorted((error for _, error in whole), reverse=True)
    assert {name for name, _ in whole} == {name for name, _ in candidates(model)}
    sampled = dict(quantization_errors(tmp_path, format, rows=16))
    assert all(0.5 * error < sampled[name] < 2 * error for name, error in whole)


def test_a_model_without_blocks_is_refused() -> None:
    class Unknown(nn.Module):
        _repeated_blocks = None

    with pytest.raises(ConfigError, match="Unknown does not say which blocks it repeats"):
        list(candidates(Unknown()))


@pytest.mark.parametrize("format", FORMATS)
def test_stored_weights_are_not_trained(format: str) -> None:
    """Whole numbers have no gradient."""
    model = tiny_transformer("flux")
    quantize(model, format)
    adapters.add_adapter(model, LoraConfig(r=2), seed=0)
    with pytest.raises(ValueError, match=r"model\.quantize=false"):
        adapters.make_everything_trainable(model)
