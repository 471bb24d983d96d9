"""Adapters: what is trainable, where it starts, what it does to the model."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from qwen_image_finetune.config import Config, ConfigError, LoraConfig
from qwen_image_finetune.levers import prepare
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.targets import endings, target_modules
from qwen_image_finetune.training.trained import restore
from tests.levers.tiny_transformers import disturb, forward, run, tiny_transformer
from tests.lora.merging import merge

FAMILIES = ["flux", "qwen"]
DECOMPOSED = ["pissa", "pissa_niter_4", "olora"]


def adapted(family: str = "flux", dtype: torch.dtype = torch.float32, seed: int = 1, **fields: Any) -> Any:
    model = tiny_transformer(family, dtype)
    adapters.add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}), seed)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapters.trainable_state(model).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_is_trainable_and_in_float32(family: str) -> None:
    model = adapted(family, torch.bfloat16)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert not any(".lora_" in name for name in frozen)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert len(trainable) == 2 * len(target_modules(model, LoraConfig().target_modules))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", *DECOMPOSED])
def test_the_start_is_a_function_of_the_seed(init: bool | str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = state(adapted(seed=1, init_lora_weights=init))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert equal(first, state(adapted(seed=1, init_lora_weights=init)))
    drawn = init not in ("pissa", "olora")  # these two follow from the base alone
    assert equal(first, state(adapted(seed=2, init_lora_weights=init))) is not drawn


def test_the_start_does_not_depend_on_the_precision_of_the_base() -> None:
    assert equal(state(adapted(dtype=torch.bfloat16)), state(adapted()))


@pytest.mark.parametrize("init", [True, "gaussian", *DECOMPOSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_starts_as_the_base_and_leaves_its_weights_alone(init: bool | str, dtype: torch.dtype) -> None:
    base = tiny_transformer("flux", dtype)
    model = adapted("flux", dtype, init_lora_weights=init)
    weights = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if ".lora_" not in name}
    assert equal(dict(base.named_parameters()), weights)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(run(model), run(base), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_decompositions_are_those_of_peft(init: str) -> None:
    model = adapted(init_lora_weights=init, target_modules=["to_q"])
    theirs = tiny_transformer("flux")
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=init))
    expected = get_peft_model_state_dict(theirs)
    ours = state(model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    disturb(model)
    adapters_of_theirs = {name: tensor for name, tensor in state(model).items() if "initial" not in name}
    peft.set_peft_model_state_dict(theirs, adapters_of_theirs)
    torch.testing.assert_close(run(model), run(theirs), atol=1e-4, rtol=1e-4)


def test_a_starting_point_is_frozen_and_the_adapter_learns() -> None:
    model = adapted(init_lora_weights="pissa").train()
    frozen = {name: p for name, p in model.named_parameters() if "default_initial" in name}
    assert frozen
    assert not any(p.requires_grad for p in frozen.values())
    output = forward(model)
    output.square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing


@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal", "pissa"])
def test_a_lora_to_start_from_replaces_every_initialisation(init: bool | str) -> None:
    found = state(adapted(init_lora_weights=init, r=3, pretrained_weight="x"))
    assert equal(found, state(adapted(init_lora_weights=True, r=3)))


@pytest.mark.parametrize("targets, message", [
    (["to_p"], "'to_p' matches no linear layer (did you mean to_"),
    (["to_q", "attn"], "matches 'transformer_blocks.0.attn', which is not a linear layer"),
    ("to_q", "an expression must match whole names"),
    (r".*attn.*", "which is not a linear layer"),
])  # fmt: skip
def test_targets_that_mean_nothing_are_refused(targets: Any, message: str) -> None:
    model = tiny_transformer("flux")
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules") as error:
        adapters.add_adapter(model, LoraConfig(target_modules=targets), 0)
    assert message in str(error.value)
    assert not adapters.adapter_names(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], r".*\.attn\.to_[qk]", "all-linear", ["proj_out"]])
def test_targets_are_read_as_peft_reads_them(family: str, targets: Any) -> None:
    theirs = tiny_transformer(family)
    theirs.add_adapter(peft.LoraConfig(target_modules=targets))
    expected = [name for name, module in theirs.named_modules() if isinstance(module, LoraLayer)]
    assert target_modules(tiny_transformer(family), targets) == expected
    assert target_modules(theirs, targets) == expected  # with an adapter already there


def test_endings() -> None:
    names = [
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.1.attn.to_out.0",
        "proj_out",
        "a.embedder.linear_1",
    ]
    assert endings(names) == ["attn.to_out.0", "proj_out", "a.embedder.linear_1"]


@pytest.mark.parametrize("fields, message", [
    ({"init_lora_weights": "orthogonal", "r": 3}, "even rank"),
    ({"init_lora_weights": "pissa", "r": 64}, "has directions"),
])  # fmt: skip
def test_ranks_that_an_initialisation_cannot_have_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(**fields)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_resumed_adapter_is_the_same_to_the_last_bit(init: bool | str) -> None:
    model = adapted(init_lora_weights=init)
    disturb(model)
    other = adapted(seed=8, init_lora_weights=init)
    restore(adapters.trainable_state(other), state(model))
    assert equal(state(other), state(model))
    assert torch.equal(run(other), run(model))


def test_the_state_has_the_keys_of_peft() -> None:
    model = adapted()
    assert equal(state(model), get_peft_model_state_dict(model))


def test_a_state_that_does_not_fit_is_refused() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match=r"2 are missing.*0 are unknown"):
        restore(state(model), dict(list(state(model).items())[2:]))
    with pytest.raises(ConfigError, match=r"is \(6, 32\), not \(4, 32\)"):
        restore(state(model), state(adapted(r=6)))


def test_full_fine_tuning_trains_every_weight_in_float32() -> None:
    model = tiny_transformer("qwen", torch.bfloat16)
    adapters.make_everything_trainable(model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    model.proj_out.weight = nn.Parameter(torch.zeros(8, 32, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match=r"proj_out.weight is torch.float8_e4m3fn"):
        adapters.make_everything_trainable(model)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_strength_goes_from_the_base_to_what_was_trained(init: bool | str) -> None:
    model = adapted(init_lora_weights=init)
    disturb(model)
    trained = run(model)
    adapters.set_strength(model, 0.5)
    adapters.set_strength(model, 0.0)
    torch.testing.assert_close(run(model), run(tiny_transformer("flux")))
    adapters.set_strength(model, 1.0)
    assert torch.equal(run(model), trained)
    with pytest.raises(ValueError, match="has no LoRA"):
        adapters.set_strength(tiny_transformer("flux"), 1.0)


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_merged_weights_do_what_the_adapter_did(init: bool | str, strength: float) -> None:
    model = adapted(init_lora_weights=init)
    disturb(model)
    adapters.set_strength(model, strength)
    expected = run(model)
    merge(model, strength)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == tiny_transformer("flux").state_dict().keys()


def test_prepare_applies_adapters_and_recomputation() -> None:
    config = Config(model={"pretrained_model_name_or_path": "x"}, train={"gradient_checkpointing": True})  # type: ignore[arg-type]
    model = prepare(tiny_transformer("flux"), config)
    assert adapters.adapter_names(model) == ("default",)
    assert model.gradient_checkpointing
    whole = Config(model={"pretrained_model_name_or_path": "x", "lora": None})  # type: ignore[arg-type]
    model = prepare(tiny_transformer("flux"), whole)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.gradient_checkpointing
