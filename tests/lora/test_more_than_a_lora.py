"""What a LoRA can have beside its two factors: DoRA, rsLoRA, patterns, dropouts, a limit on the norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError, LoraConfig
from qwen_image_finetune.families import get_family
from qwen_image_finetune.levers.quantized_linear import QuantizedLinear, quantised
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.export import Dialect, export
from qwen_image_finetune.lora.files import load_lora, save_lora
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.lora.layers import Layer
from qwen_image_finetune.lora.reading import read_lora
from tests.levers.tiny_transformers import disturb, run, tiny_transformer
from tests.lora.merging import merge

NAMES = {"flux": "FluxKontext", "qwen": "QwenImageEdit"}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"to_q": 2, r"transformer_blocks\.1\.attn\.to_k": 3},
    "alpha_pattern": {"to_q": 6},
}
DORA: dict[str, Any] = {"use_dora": True, "use_rslora": True, **PATTERNS}


def adapted(family: str = "flux", model: Any = None, **fields: Any) -> Any:
    model = tiny_transformer(family) if model is None else model
    adapters.add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}), seed=1)
    disturb(model)
    return model


def of_peft(model: Any, trained: Any, **fields: Any) -> Any:
    """The same adapter in a model, by peft alone."""
    model.add_adapter(peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    state = get_peft_model_state_dict(trained)
    assert state.keys() == get_peft_model_state_dict(model).keys()
    set_peft_model_state_dict(model, state)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".weight")}


@pytest.mark.parametrize("fields", [DORA, {**PATTERNS, "use_rslora": True}, {"use_dora": True}])
def test_it_is_what_peft_makes_of_the_same_settings(fields: dict[str, Any]) -> None:
    ours = adapted(target_modules=["to_q", "to_k", "proj_mlp"], **fields)
    theirs = of_peft(tiny_transformer("flux"), ours, target_modules=["to_q", "to_k", "proj_mlp"], **fields)
    torch.testing.assert_close(run(ours), run(theirs), atol=1e-5, rtol=1e-5)
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
    adapters.remove(theirs)
    merge(ours)
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-5, rtol=1e-5)


def test_a_dora_starts_as_the_base_and_learns_lengths() -> None:
    model = tiny_transformer("flux")
    base = run(model)
    adapters.add_adapter(model, LoraConfig(r=4, use_dora=True), seed=1)
    torch.testing.assert_close(run(model), base, atol=1e-5, rtol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(name.endswith("lora_magnitude_vector.default.weight") for name in trained) == len(trained) / 3


def test_the_change_of_a_dora_is_that_of_its_formula_in_float64() -> None:
    torch.manual_seed(0)
    weight, down, up, length = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2), torch.rand(6) + 0.5
    found = Layer(down, up, 3.0, length).change(weight)
    changed = weight.double() + 1.5 * up.double() @ down.double()
    expected = length[:, None].double() * changed / changed.norm(dim=1, keepdim=True) - weight.double()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(Layer(down, up, 3.0, length).change(weight[2:4], 2), found[2:4], atol=0, rtol=0)


def in_format(model: Any, format: str, numbers: bool = False) -> Any:
    """Quantised, or in full precision with what the quantised weights mean."""
    for block in model.transformer_blocks:
        for name in ("to_q", "to_k", "to_v"):
            layer = getattr(block.attn, name)
            stored = quantised(layer.weight.data, format, layer.bias)
            if numbers:
                layer.weight.data = stored.dequantised(torch.float32)
            else:
                setattr(block.attn, name, stored)
    return model


@pytest.mark.parametrize("format", ["fp8", "int8", "nf4"])
def test_a_quantised_base_has_the_lengths_of_its_numbers(format: str) -> None:
    ours = in_format(tiny_transformer("qwen"), format)
    ours = adapted(model=ours, target_modules=["to_q", "to_k"], use_dora=True)
    assert any(isinstance(module, QuantizedLinear) for module in ours.modules())
    plain = in_format(tiny_transformer("qwen"), format, numbers=True)
    theirs = of_peft(plain, ours, target_modules=["to_q", "to_k"], use_dora=True)
    torch.testing.assert_close(run(ours), run(theirs), atol=1e-5, rtol=1e-4)


def test_strength_scales_the_whole_change_and_changes_add_up() -> None:
    base, model = tiny_transformer("flux"), adapted(**DORA)
    adapters.set_strength(model, 0.0)
    torch.testing.assert_close(run(model), run(base), atol=1e-6, rtol=1e-6)
    adapters.add_adapter(model, LoraConfig(r=2, use_dora=True, adapter_name="second"), seed=2)
    disturb(model, seed=6)
    adapters.activate(model, ["default", "second"])
    adapters.set_strength(model, 0.5, "default")
    adapters.set_strength(model, 0.25, "second")
    expected = run(model)
    original = weights(base)
    added: dict[str, Any] = {}
    for name, strength in (("default", 0.5), ("second", 0.25)):
        for module, layer in adapters.adapter_layers(model, name).items():
            change = strength * layer.change(original[f"{module}.weight"])
            added[module] = added.get(module, 0) + change
    for module, change in added.items():
        base.get_submodule(module).weight.data += change
    torch.testing.assert_close(run(base), expected, atol=1e-5, rtol=1e-5)


def comfyui(weight: Tensor, state: dict[str, Tensor], stem: str) -> Tensor:
    """A weight as comfy/weight_adapter/lora.py and base.py (weight_decompose) make it of a file."""
    down, up = (state[f"{stem}.lora_{part}.weight"] for part in "AB")
    alpha = float(state[f"{stem}.alpha"]) / down.shape[0] if f"{stem}.alpha" in state else 1.0
    changed = weight + alpha * up @ down
    return changed * (state[f"{stem}.dora_scale"] / weight.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_a_dora_is_the_same_in_diffusers_and_comfyui(family: str, tmp_path: Path) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0", *(["proj_mlp"] if family == "flux" else [])]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **DORA)
    model = adapted(family, target_modules=targets, **DORA)
    expected, base, naming = run(model), tiny_transformer(family), get_family(NAMES[family]).naming
    save_lora(tmp_path / "x.safetensors", model, config, {})
    state, original = load_file(tmp_path / "x.safetensors"), weights(base)
    wanted = {name: original[f"{name}.weight"] + layer.change(original[f"{name}.weight"])
              for name, layer in adapters.adapter_layers(model, "default").items()}  # fmt: skip
    for module, weight in wanted.items():
        found = comfyui(original[f"{module}.weight"], state, f"transformer.{module}")
        torch.testing.assert_close(found, weight, atol=1e-5, rtol=1e-4)

    theirs = tiny_transformer(family)
    kept = naming.pipeline.lora_state_dict(dict(state), return_lora_metadata=True)[0]  # as a pipeline reads the file
    theirs.load_lora_adapter(kept, prefix="transformer")
    torch.testing.assert_close(run(theirs), expected, atol=1e-5, rtol=1e-4)

    for dialect in get_args(Dialect):
        said = export(tmp_path / "x.safetensors", tmp_path / f"{dialect}.safetensors", dialect, naming)
        again = tiny_transformer(family)
        load_lora(again, tmp_path / f"{dialect}.safetensors", naming)
        torch.testing.assert_close(run(again), expected, atol=1e-5, rtol=1e-4)
        reads = next(line for line in said if line.startswith("diffusers"))
        assert ("reads all of it" in reads) == (dialect == "diffusers")
    comfy = load_file(tmp_path / "comfy.safetensors")
    for name, native in naming.native.items():
        stem = f"diffusion_model.{name.replace('{}', '0')}"
        if f"{stem}.dora_scale" in comfy and not native.halves_swapped:
            parts = [part.replace("{}", "0") for part in native.modules]
            fused = torch.cat([original[f"{part}.weight"] for part in parts])
            found = comfyui(fused, comfy, stem)
            torch.testing.assert_close(found, torch.cat([wanted[part] for part in parts]), atol=1e-5, rtol=1e-4)


def test_lengths_of_a_part_of_a_fused_matrix_are_refused_where_they_are_one(tmp_path: Path) -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["to_q"])
    save_lora(tmp_path / "x.safetensors", adapted(use_dora=True, target_modules=["to_q"]), config, {})
    naming = get_family("FluxKontext").naming
    with pytest.raises(
        LoraFileError, match=r"are one matrix with .*to_k.* use --format diffusers, which ComfyUI reads"
    ):
        export(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "comfy", naming)


def test_a_dora_goes_on_from_a_dora_or_a_lora_and_a_lora_from_no_dora(tmp_path: Path) -> None:
    naming = get_family("FluxKontext").naming
    dora, plain = LoraConfig(r=4, lora_alpha=8, use_dora=True), LoraConfig(r=4, lora_alpha=8)
    for name, config in (("dora", dora), ("plain", plain)):
        model = adapted(use_dora=config.use_dora)
        save_lora(tmp_path / f"{name}.safetensors", model, config, {})
        again = tiny_transformer("flux")
        load_lora(again, tmp_path / f"{name}.safetensors", naming, dora)
        torch.testing.assert_close(run(again), run(model), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"dora.safetensors is a DoRA.*set model.lora.use_dora to true"):
        load_lora(tiny_transformer("flux"), tmp_path / "dora.safetensors", naming, plain)


def test_lycoris_means_the_lengths_themselves(tmp_path: Path) -> None:
    layer = Layer(torch.randn(2, 32), torch.randn(32, 2), 2.0, torch.rand(32) + 1)
    from qwen_image_finetune.lora.dialects import write_state
    from qwen_image_finetune.lora.files import write

    naming = get_family("FluxKontext").naming
    state = write_state({"transformer_blocks.0.attn.to_out.0": layer}, {}, "comfy")
    assert not any("magnitude" in key for key in state)
    write(tmp_path / "x.safetensors", state, {})  # type: ignore[arg-type]
    [found] = read_lora(tmp_path / "x.safetensors", naming).layers.values()
    assert torch.equal(found.magnitude, layer.magnitude) and found.dora_scale is None  # type: ignore[arg-type]


def test_dropouts_leave_the_mean_of_an_output_and_go_at_prediction() -> None:
    choices: tuple[dict[str, Any], ...] = ({"rank_dropout": 0.5}, {"lora_dropout": 0.5, "use_dora": True})
    for fields in choices:
        model = adapted(target_modules=["to_out.0"], **fields)
        [layer, *_] = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        x = torch.randn(400, 3, layer.in_features, generator=torch.Generator().manual_seed(1))[:1].expand(4000, 3, -1)
        with torch.no_grad():
            at_rest = layer.eval()(x[:1])
            torch.manual_seed(3)
            drawn = layer.train()(x)
        assert not torch.equal(drawn[0], drawn[1])
        change = (at_rest - layer.get_base_layer()(x[:1])).norm()
        assert float((drawn.mean(dim=0) - at_rest[0]).norm() / change) < 0.1


def test_module_dropout_leaves_the_base_or_the_whole_change() -> None:
    model = adapted(target_modules=["to_out.0"], module_dropout=0.3, use_dora=True)
    [layer, *_] = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    x = torch.randn(2, 3, layer.in_features)
    torch.manual_seed(4)
    with torch.no_grad():
        whole, base = layer.eval()(x), layer.get_base_layer()(x)
        layer.train()
        drawn = [layer(x) for _ in range(200)]
    left = sum(torch.allclose(each, base, atol=1e-6) for each in drawn)
    assert left + sum(torch.allclose(each, whole, atol=1e-6) for each in drawn) == 200
    assert 40 <= left <= 80


def test_a_limit_scales_the_changes_that_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(use_rslora=True, **PATTERNS)
    before = {name: layer.delta() for name, layer in adapters.adapter_layers(model, "default").items()}
    norms = sorted(float(delta.norm()) for delta in before.values())
    limit = norms[len(norms) // 2]
    adapters.limit_norms(model, limit)
    for name, layer in adapters.adapter_layers(model, "default").items():
        expected = before[name] * min(1.0, limit / float(before[name].norm()))
        torch.testing.assert_close(layer.delta(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("fields", "message"), [
    ({"exclude_modules": ["to_p"]}, "exclude_modules: 'to_p' leaves nothing out; the targets end in attn.to_q"),
    ({"exclude_modules": ".*"}, "exclude_modules='.*' leaves no target to train"),
    ({"rank_pattern": {"to_p": 4}}, "rank_pattern: 'to_p' matches no target; they end in attn.to_q"),
    ({"alpha_pattern": {"to_p": 4}}, "alpha_pattern: 'to_p' matches no target"),
])  # fmt: skip
def test_names_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        adapted(**fields)


def test_targets_can_be_left_out(tmp_path: Path) -> None:
    model = adapted(exclude_modules=["to_q", "transformer_blocks.0.attn.to_k"])
    layers = adapters.adapter_layers(model, "default")
    assert "transformer_blocks.1.attn.to_k" in layers and "single_transformer_blocks.0.attn.to_v" in layers
    assert not [name for name in layers if name.endswith("to_q")] and "transformer_blocks.0.attn.to_k" not in layers
    save_lora(tmp_path / "x.safetensors", model, LoraConfig(exclude_modules=["to_q"]), {})
    theirs = tiny_transformer("flux")
    theirs.load_lora_adapter(tmp_path / "x.safetensors", use_safetensors=True)
    torch.testing.assert_close(run(theirs), run(model), atol=1e-5, rtol=1e-5)
