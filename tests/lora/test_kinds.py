"""LoKr, LoHa and OFT: what peft makes of them, on any base, in every file and program that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError, LoraConfig
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.footprint import footprint, stand_in
from qwen_image_finetune.levers.quantized_linear import QuantizedLinear
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.export import export
from qwen_image_finetune.lora.files import load_lora, save_lora
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.lora.kinds import KINDS
from qwen_image_finetune.lora.other_layers import Hadamard, Kronecker, Rotation
from qwen_image_finetune.lora.readers import readers_words
from qwen_image_finetune.lora.reading import read_lora
from qwen_image_finetune.lora.targets import adapted_layers
from tests.levers.tiny_transformers import disturb, run, tiny_transformer
from tests.lora.merging import merge
from tests.lora.test_more_than_a_lora import in_format

NAMES = {"flux": "FluxKontext", "qwen": "QwenImageEdit"}
TARGETS = ["to_q", "to_k", "proj_mlp"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_k": 2.0}}
COMMON: dict[str, Any] = {"r": 2, "alpha": 6, "target_modules": TARGETS}
# our settings, and peft's configuration of the same
KINDS_OF_PEFT: dict[str, tuple[dict[str, Any], peft.PeftConfig]] = {
    "lokr": ({"r": 2, "lora_alpha": 6, **PATTERNS}, peft.LoKrConfig(**COMMON, **PATTERNS)),
    "lokr in fours": ({"type": "lokr", "r": 2, "lora_alpha": 6, "decompose_factor": 4},
                      peft.LoKrConfig(**COMMON, decompose_factor=4)),
    "loha": ({"r": 2, "lora_alpha": 6, **PATTERNS}, peft.LoHaConfig(**COMMON, **PATTERNS)),
    "oft": ({"oft_block_size": 8},
            peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False)),
}  # fmt: skip
OTHERS = ("lokr", "loha", "oft")


def config_of(name: str, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"type": name, "target_modules": TARGETS, **KINDS_OF_PEFT[name][0], **fields})


def adapted(name: str, model: Any = None, **fields: Any) -> Any:
    model = tiny_transformer("flux") if model is None else model
    adapters.add_adapter(model, config_of(name, **fields), seed=1)
    disturb(model)
    return model


def of_peft(name: str, model: Any, trained: Any) -> Any:
    """The same adapter in a model, by peft alone."""
    peft.inject_adapter_in_model(KINDS_OF_PEFT[name][1], model)
    state = get_peft_model_state_dict(trained)
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in get_peft_model_state_dict(model).items()
    }
    set_peft_model_state_dict(model, state)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".weight")}


@pytest.mark.parametrize("name", KINDS_OF_PEFT)
def test_it_is_what_peft_makes_of_the_same_settings(name: str) -> None:
    ours = adapted(name)
    theirs = of_peft(name, tiny_transformer("flux"), ours)
    torch.testing.assert_close(run(ours), run(theirs), atol=1e-5, rtol=1e-5)
    for layer in theirs.modules():
        if isinstance(layer, tuple(kind.layer for kind in KINDS.values())):
            layer.merge()
    adapters.remove(theirs)
    merge(ours)
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_it_starts_as_the_base_by_the_seed_and_strength_scales_all_of_it(name: str) -> None:
    base, states = run(tiny_transformer("flux")), []
    for seed in (1, 1, 2):
        model = tiny_transformer("flux")
        adapters.add_adapter(model, config_of(name), seed=seed)
        states.append(adapters.trainable_state(model))
        assert {tensor.dtype for tensor in states[-1].values()} == {torch.float32}
        torch.testing.assert_close(run(model), base, atol=1e-5, rtol=1e-5)
    same = [all(torch.equal(states[0][key], other[key]) for key in states[0]) for other in states[1:]]
    assert same == [True, name == "oft"]
    disturb(model)
    adapters.set_strength(model, 0.0)
    torch.testing.assert_close(run(model), base, atol=1e-6, rtol=1e-6)
    adapters.set_strength(model, 0.5)
    halfway = run(model)
    merge(model, 0.5)
    torch.testing.assert_close(run(model), halfway, atol=1e-5, rtol=1e-5)


def test_changes_are_those_of_their_formulas_in_float64() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 12)
    w1a, w1b, w2 = torch.randn(2, 1), torch.randn(1, 3), torch.randn(3, 4)
    wide = [[float((w1a @ w1b)[row // 3, column // 4] * w2[row % 3, column % 4]) * 0.5 for column in range(12)]
            for row in range(6)]  # fmt: skip
    torch.testing.assert_close(Kronecker((w1a, w1b), (w2,), 0.5).change(weight).double(), torch.tensor(wide).double())
    a, b, c, d = torch.randn(6, 2), torch.randn(2, 12), torch.randn(6, 2), torch.randn(2, 12)
    expected = 3.0 * (a.double() @ b.double()) * (c.double() @ d.double())
    torch.testing.assert_close(Hadamard((a, b), (c, d), 3.0).change(weight).double(), expected, atol=1e-5, rtol=1e-5)
    above = torch.randn(3, 6)
    turned = weight + Rotation(above).change(weight)
    torch.testing.assert_close(turned.norm(dim=1), weight.norm(dim=1))  # lengths stay, and angles
    torch.testing.assert_close(turned @ turned.T, weight @ weight.T, atol=1e-4, rtol=1e-4)
    skew = torch.zeros(4, 4, dtype=torch.float64)
    skew[tuple(torch.triu_indices(4, 4, 1))] = above[1].double()
    skew = skew - skew.T
    block = (torch.eye(4).double() - skew) @ torch.linalg.inv(torch.eye(4).double() + skew)
    torch.testing.assert_close(turned[:, 4:8].double(), weight[:, 4:8].double() @ block.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_quantised_base_is_asked_for_its_output_alone(name: str, format: str) -> None:
    ours = adapted(name, in_format(tiny_transformer("qwen"), format), target_modules=["to_q", "to_k"])
    assert any(isinstance(module, QuantizedLinear) for module in ours.modules())
    plain = adapted(name, in_format(tiny_transformer("qwen"), format, numbers=True), target_modules=["to_q", "to_k"])
    torch.testing.assert_close(run(ours), run(plain), atol=1e-5, rtol=1e-4)


def comfyui(state: dict[str, Tensor], stem: str, weight: Tensor) -> Tensor:
    """The change that comfy/weight_adapter/lokr.py and loha.py make of a file without alpha."""
    parts = {key.removeprefix(f"{stem}."): tensor for key, tensor in state.items() if key.startswith(f"{stem}.")}
    if "hada_w1_a" in parts:
        return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    w1, w2 = (parts[n] if n in parts else parts[f"{n}_a"] @ parts[f"{n}_b"] for n in ("lokr_w1", "lokr_w2"))
    return torch.kron(w1, w2).reshape(weight.shape)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("name", OTHERS)
def test_its_file_is_read_as_it_is_meant(name: str, family: str, tmp_path: Path) -> None:
    config = config_of(name, target_modules=["to_q", "to_k", "to_out.0"])
    model = tiny_transformer(family)
    adapters.add_adapter(model, config, seed=1)
    disturb(model)
    expected, naming, original = run(model), get_family(NAMES[family]).naming, weights(tiny_transformer(family))
    path = tmp_path / "x.safetensors"
    save_lora(path, model, config, {})
    for settings in (None, config):  # at prediction, and to go on from
        again = tiny_transformer(family)
        load_lora(again, path, naming, settings)
        torch.testing.assert_close(run(again), expected, atol=1e-5, rtol=1e-4)
    state = load_file(path)
    if name == "lokr":
        theirs = tiny_transformer(family)
        theirs.load_lora_adapter(naming.pipeline.lora_state_dict(dict(state)), prefix="transformer")
        torch.testing.assert_close(run(theirs), expected, atol=1e-5, rtol=1e-4)
    if name == "oft":
        with pytest.raises(LoraFileError, match="an OFT on the side of inputs is known to peft"):
            export(path, tmp_path / "y.safetensors", "comfy", naming)
        return
    for module, layer in adapters.adapter_layers(model, "default").items():
        weight = original[f"{module}.weight"]
        found = comfyui(state, f"transformer.{module}", weight)
        torch.testing.assert_close(found, layer.change(weight), atol=1e-6, rtol=1e-5)
    if family == "flux":  # query, key and value are one matrix there
        with pytest.raises(LoraFileError, match=r"parts of a matrix.*use --format diffusers"):
            export(path, tmp_path / "y.safetensors", "comfy", naming)
    else:
        said = export(path, tmp_path / "y.safetensors", "comfy", naming)
        assert "ComfyUI reads all of it" in said
        exported = load_file(tmp_path / "y.safetensors")
        assert exported.keys() == {key.replace("transformer.", "diffusion_model.", 1) for key in state}
    said = export(path, tmp_path / "z.safetensors", "diffusers", naming)
    title = KINDS[name].title
    wanted = "diffusers reads all of it" if name == "lokr" else f"diffusers reads no {title} of this format"
    assert any(line.startswith(wanted) for line in said)


def test_every_program_of_the_table_says_what_it_makes_of_a_kind() -> None:
    for kind in ("DoRA", "LoKr", "LoHa", "OFT"):
        lines = readers_words(get_family("QwenImageEdit").lora_readers, "diffusers", ["a"], kind)
        assert sum("reads no" in line for line in lines) == {"DoRA": 1, "LoKr": 1, "LoHa": 2, "OFT": 3}[kind]


def test_alpha_of_another_program_counts_by_the_rank_of_a_factor(tmp_path: Path) -> None:
    """comfy/weight_adapter/lokr.py: alpha / rank where a factor is the product of two, else it does not count."""
    stem, naming = "diffusion_model.transformer_blocks.0.attn.to_q", get_family("QwenImageEdit").naming
    width = 3072
    whole = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(width // 4, width // 4)}
    halves = {
        "lokr_w1": whole["lokr_w1"],
        "lokr_w2_a": torch.randn(width // 4, 2),
        "lokr_w2_b": torch.randn(2, width // 4),
    }
    loha = {f"hada_w{n}_{e}": torch.randn(shape) for n in "12" for e, shape in (("a", (width, 4)), ("b", (4, width)))}
    for tensors, scale in ((whole, 1.0), (halves, 3.0), (loha, 1.5)):
        state = {f"{stem}.{key}": tensor for key, tensor in tensors.items()} | {f"{stem}.alpha": torch.tensor(6.0)}
        save_file(state, tmp_path / "x.safetensors")
        [layer] = read_lora(tmp_path / "x.safetensors", naming).layers.values()
        assert layer.scale == scale  # type: ignore[attr-defined]
    del state[f"{stem}.hada_w2_b"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError, match="which is no whole LoKr, LoHa or OFT"):
        read_lora(tmp_path / "x.safetensors", naming)


@pytest.mark.parametrize("name", ["lokr", "loha"])
def test_a_limit_scales_the_changes_that_are_larger(name: str) -> None:
    model = adapted(name)
    zeros = {module: torch.zeros_like(layer.get_base_layer().weight) for module, layer in adapted_layers(model)}
    before = {
        module: layer.change(zeros[module]) for module, layer in adapters.adapter_layers(model, "default").items()
    }
    norms = sorted(float(change.norm()) for change in before.values())
    adapters.limit_norms(model, limit := norms[len(norms) // 2])
    for module, layer in adapters.adapter_layers(model, "default").items():
        expected = before[module] * min(1.0, limit / float(before[module].norm()))
        torch.testing.assert_close(layer.change(zeros[module]), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["lokr", "loha"])
def test_dropout_of_outputs_and_of_passes(name: str) -> None:
    model = adapted(name, rank_dropout=0.5, module_dropout=0.5, target_modules=["to_q", "to_k"])
    layer = next(module for module in model.modules() if isinstance(module, KINDS[name].layer))
    x = torch.randn(1, 3, layer.in_features)
    torch.manual_seed(1)
    with torch.no_grad():
        base = layer.get_base_layer()(x)
        change = layer.eval()(x) - base
        drawn = torch.stack([layer.train()(x) - base for _ in range(2000)])
    assert 900 < sum(not each.any() for each in drawn.abs() > 1e-6) < 1100  # whole passes
    assert float((2 * drawn.mean(dim=0) - change).norm() / change.norm()) < 0.1


@pytest.mark.parametrize(("fields", "message"), [
    ({"type": "oft", "oft_block_size": 5}, "oft_block_size=5 does not divide the 32 inputs of transformer_blocks.0"),
    ({"type": "loha", "use_dora": True}, "use_dora=true and model.lora.type=loha exclude each other: DoRA gives"),
    ({"type": "oft", "max_norm": 1.0}, "max_norm=1.0 and model.lora.type=oft exclude each other: a rotation leaves"),
    ({"decompose_factor": 4}, "decompose_factor=4 and model.lora.type=lora exclude each other"),
])  # fmt: skip
def test_what_a_kind_has_not_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapters.add_adapter(tiny_transformer("flux"), LoraConfig(**fields), seed=0)


def test_a_file_of_another_kind_or_shape_is_not_gone_on_from(tmp_path: Path) -> None:
    naming, path = get_family("FluxKontext").naming, tmp_path / "x.safetensors"
    save_lora(path, adapted("lokr"), config_of("lokr"), {})
    with pytest.raises(ConfigError, match=r"is a LoKr, and model.lora.type=loha asks for a LoHa"):
        load_lora(tiny_transformer("flux"), path, naming, config_of("loha"))
    with pytest.raises(ConfigError, match="set r, decompose_factor and rank_pattern to the file's"):
        load_lora(tiny_transformer("flux"), path, naming, config_of("lokr", decompose_factor=2))


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"type": "lokr"}, {"type": "loha"}, {"type": "oft", "oft_block_size": 8}]
)
def test_a_plan_counts_what_is_trained(settings: dict[str, Any]) -> None:
    family, model = get_family("FluxKontext"), tiny_transformer("flux")
    config, about = LoraConfig(r=4, **settings), dict(model.config)
    found = footprint(family, about, stand_in(family, about, [(64, 64)] * 2, rows=1, text_tokens=5), config)
    adapters.add_adapter(model, config, seed=1)
    assert found.adapter == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.kept(None) > found.kept("none")
