"""Recomputation: bit-equal to none whatever is kept, and what is kept is what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saved_bytes import saved_bytes
from tiny_transformers import disturb, forward, tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.levers.quantize import quantize
from qwen_image_finetune.levers.recompute import Product, blocks, choose, is_attention, recompute
from qwen_image_finetune.lora import adapters

FAMILIES = ["flux", "qwen"]
KEPT: list[Any] = ["none", 0.0, 0.3, 0.7, 1.0]


def adapted(family: str, quantised: bool = False) -> Any:
    model = tiny_transformer(family)
    if quantised:
        quantize(model, "fp8")
    adapters.add_adapter(model, LoraConfig(r=4, lora_alpha=8), seed=1)
    disturb(model)
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    forward(model).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_is_bit_equal_to_none(family: str, keep: Any, quantised: bool) -> None:
    plain, recomputed = adapted(family, quantised), adapted(family, quantised)
    recompute(recomputed, keep)
    expected, found = gradients(plain), gradients(recomputed)
    assert len(expected) > 10
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_full_fine_tuning_is_bit_equal_as_well() -> None:
    plain, recomputed = tiny_transformer("flux"), tiny_transformer("flux")
    for model in (plain, recomputed):
        adapters.make_everything_trainable(model.train())
    recompute(recomputed, 0.5)
    expected, found = gradients(plain), gradients(recomputed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_is_kept_where_more_is_asked_for(family: str) -> None:
    kept = []
    for keep in KEPT:
        model = adapted(family)
        recompute(model, keep)
        kept.append(saved_bytes(model, forward))
    nothing_recomputed = saved_bytes(adapted(family), forward)
    assert kept == sorted(kept)
    assert len(set(kept)) == len(kept)
    assert kept[0] < nothing_recomputed / 2


def test_attention_runs_once_where_its_output_is_kept() -> None:
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += is_attention(operator) and "backward" not in operator.name()
            return operator(*args, **(kwargs or {}))

    def attentions(keep: Any) -> int:
        model = adapted("flux")
        recompute(model, keep)
        with Counter() as counter:
            gradients(model)
        return counter.count

    assert attentions(0.0) == 4  # one a block
    assert attentions("none") == 8


def test_dropout_is_the_same_when_it_is_drawn_again() -> None:
    def run(keep: float | None) -> dict[str, torch.Tensor]:
        model = tiny_transformer("flux")
        adapters.add_adapter(model, LoraConfig(r=4, lora_dropout=0.5), seed=1)
        disturb(model)
        if keep is not None:
            recompute(model, keep)
        torch.manual_seed(3)
        return gradients(model.train())

    expected, found = run(None), run(0.5)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_choice_is_by_time_for_each_byte() -> None:
    products = [Product(k=8, size=10), Product(k=32, size=10), Product(k=16, size=40), Product(k=64, size=10)]
    assert choose(products, 0.0) == frozenset()
    assert choose(products, 1.0) == {0, 1, 2}  # not the last, which is not recomputed
    assert choose(products, 0.2) == {1}
    assert choose(products, 0.5) == {0, 1}  # 30 bytes: what fits in place of the 40
    assert choose(products, 0.85) == {1, 2}


def test_blocks_come_in_the_order_they_run_in() -> None:
    names = [type(block).__name__ for block in blocks(tiny_transformer("flux"))]
    assert names == ["FluxTransformerBlock"] * 2 + ["FluxSingleTransformerBlock"] * 2
