"""Every pair of levers: refused with the configuration, or equal to a plain run; to the bit if nothing is compiled."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from tiny_transformers import disturb, forward, tiny_transformer
from torch import Tensor

from qwen_image_finetune import levers
from qwen_image_finetune.config import Config
from qwen_image_finetune.levers import compile as compiling
from qwen_image_finetune.levers import quantized_linear
from qwen_image_finetune.levers.offload import Offload, Offloaded
from qwen_image_finetune.levers.quantize import quantize
from qwen_image_finetune.levers.release import GradientRelease
from qwen_image_finetune.levers.single_steps import SingleSteps

# Keys of train that turn a lever on, with those it cannot do without.
RECOMPUTED = {"gradient_checkpointing": True}
LEVERS: dict[str, dict[str, Any]] = {
    "recompute": {**RECOMPUTED, "keep_activations": "none"},
    "keep": {**RECOMPUTED, "keep_activations": 0.5},
    "swap": {"blocks_to_swap": 2},
    "offload": {"offload_activations": True},
    "compile": {"compile": True},
    "release": {"release_gradients": True, "max_grad_norm": None},
    "math": {"attention": "math"},
}
FORMATS = ("fp8", "nf4")  # int8 is computed like the one on a CPU, fp4 like the other
ALONE = {"swap": RECOMPUTED}  # what a lever needs where the other one of the pair does not bring it
REFUSED = {  # everything else is tried
    frozenset(pair) for pair in [("swap", "compile"), ("swap", "release"), *(("release", format) for format in FORMATS)]
}
PAIRS = [
    pair
    for pair in itertools.combinations([*LEVERS, *FORMATS], 2)
    if not set(pair) <= set(FORMATS) and set(pair) != {"recompute", "keep"}
]


# What a LoRA sits on where blocks are compiled: some layers of every kind, which the compiler gets through in less
# time. With the first two, both blocks' inputs need gradients, and one compilation serves both.
COMPILED = ["img_in", "txt_in", "to_q", "add_k_proj", "to_out.0", "img_mod.1", "img_mlp.net.2", "txt_mlp.net.2"]


def configured(pair: tuple[str, ...], targets: Any) -> Config:
    train: dict[str, Any] = {"mixed_precision": "no"}
    for name in pair:
        train |= {key: value for key, value in ALONE.get(name, {}).items() if key not in train}
        train |= LEVERS.get(name, {})
    format = next((name for name in pair if name in (*FORMATS, "int8")), False)
    lora = None if "release" in pair else {"r": 4, "lora_alpha": 8, "target_modules": targets}
    return Config.model_validate(
        {"model": {"pretrained_model_name_or_path": "tiny", "quantize": format, "lora": lora}, "train": train}
    )


def gradients(family: str, config: Config) -> dict[str, Tensor]:
    """Of everything that is trained, after two passes; with released gradients, the weights themselves."""
    model = tiny_transformer(family)
    if config.model.quantize:
        quantize(model, str(config.model.quantize))
    levers.prepare(model, config, torch.device("cpu"))
    disturb(model)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    if config.train.release_gradients:
        GradientRelease(SingleSteps(optimizer), trained.values())
    for _ in range(2):
        forward(model).square().sum().backward()
    if config.model.lora is not None:
        return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    if not config.train.release_gradients:
        optimizer.step()
    return {name: p.detach().clone() for name, p in trained.items()}


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what waits on the host; tiny tensors do too."""
    monkeypatch.setattr(Offload.__init__, "__defaults__", (0,))
    counted: list[int] = []
    pack = Offload.pack

    def count(self: Offload, tensor: Tensor) -> Any:
        packed = pack(self, tensor)
        counted.append(isinstance(packed, Offloaded))
        return packed

    monkeypatch.setattr(Offload, "pack", count)
    return counted


@pytest.mark.parametrize(("number", "pair"), enumerate(PAIRS), ids=["-".join(pair) for pair in PAIRS])
def test_a_pair_is_refused_or_changes_nothing(
    number: int, pair: tuple[str, str], offloaded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if frozenset(pair) in REFUSED:
        with pytest.raises(ValueError, match=r"exclude each other|cannot be fully fine-tuned"):
            configured(pair, "all-linear")
        return
    monkeypatch.setattr(compiling, "Compilation", partial(compiling.Compilation, "aot_eager"))
    family = ("flux", "qwen")[number % 2] if "compile" not in pair else "qwen"  # which has one kind of block
    targets = COMPILED if "compile" in pair else "all-linear"
    plain = configured(tuple(name for name in pair if name in FORMATS or name == "release"), targets)
    expected, found = gradients(family, plain), gradients(family, configured(pair, targets))
    assert len(expected) > 20
    assert expected.keys() <= found.keys()
    for name, tensor in found.items():
        if (
            name not in expected
        ):  # the text stream of the last block leads nowhere: compiled, its gradient is 0, not None
            assert "compile" in pair and not tensor.any(), name
        elif "compile" in pair or "math" in pair:  # sums in another order
            assert float((tensor - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()) + 1e-12, name
        else:
            assert torch.equal(tensor, expected[name]), name
    assert any(offloaded) == ("offload" in pair)


def test_what_a_plan_joins_for_a_small_card(offloaded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 that is multiplied as int8, compiled, attention kept, the rest on the host: as the same products alone.

    In 16 bits, in which they are: a sum in another order may round an activation to the next code.
    """
    monkeypatch.setattr(compiling, "Compilation", partial(compiling.Compilation, "aot_eager"))
    plain, joined = configured(("int8",), COMPILED), configured(("int8", "keep", "compile", "offload"), COMPILED)
    with torch.autocast("cpu", torch.bfloat16):
        in_16_bits = gradients("qwen", plain)
        monkeypatch.setattr(quantized_linear, "has_int8_products", lambda device: True)
        expected = gradients("qwen", plain)
        assert not any(offloaded)
        found = gradients("qwen", joined)
    assert any(offloaded) and len(expected) > 20
    assert any(not torch.equal(tensor, in_16_bits[name]) for name, tensor in expected.items())
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 1e-2 * float(tensor.norm()), name
