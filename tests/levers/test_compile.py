"""Compiled blocks: equal to eager ones within a bound, and compiled no more often than said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny_transformers import disturb, forward, tiny_transformer
from torch import Tensor, nn
from torch.nn import functional

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.levers import compile
from qwen_image_finetune.levers.attention import use_attention
from qwen_image_finetune.levers.compile import STATIC, Compilation
from qwen_image_finetune.levers.joined import COUNTER
from qwen_image_finetune.levers.quantize import quantize
from qwen_image_finetune.levers.recompute import blocks, recompute
from qwen_image_finetune.lora import adapters


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.down, self.up = (
            nn.ModuleList(nn.Linear(*sides, bias=False) for _ in range(2)) for sides in ((width, 2), (2, width))
        )

    def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
        adapted = [up(down(hidden)) for down, up in zip(self.down, self.up, strict=True)]
        query = (self.to_q(hidden) + adapted[0] + adapted[1]).unflatten(-1, (2, -1)).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(query, query, query).transpose(1, 2).flatten(2)
        return hidden + scale * self.to_out(functional.gelu(attended))


class ToyTransformer(ModelMixin, ConfigMixin):
    """As small as something with blocks can be: a compiler takes seconds for it."""

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("ToyBlock",)

    @register_to_config
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList([ToyBlock(width), ToyBlock(width)])

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, hidden, torch.ones(16))
            else:
                hidden = block(hidden, torch.ones(16))
        return hidden


def most_graphs(transformer: nn.Module, num_geometries: int) -> int:
    """The bound that docs/performance.md states, for so many sizes of batch, pictures and text."""
    kinds = {type(block) for block in blocks(transformer)}
    return (len(kinds) + 1) * min(num_geometries, compile.STATIC + 1)


def gradients(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(hidden).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("keep", [None, 0.5])
def test_compiled_equals_eager(keep: float | None) -> None:
    """Within 1e-5 of the norm of each gradient: float32, sums in another order."""
    torch.manual_seed(0)
    eager = ToyTransformer()
    compiled = ToyTransformer()
    compiled.load_state_dict(eager.state_dict())
    compilation = Compilation()
    if keep is None:
        compilation.compile_blocks(compiled)
    else:
        recompute(compiled, keep, compilation.wrap)
    hidden = torch.randn(1, 6, 16, requires_grad=True)  # as of the second block: one graph serves both
    # A graph that an earlier session compiled would be read from the disk, and nothing joined.
    with torch._inductor.config.patch(force_disable_caches=True):
        expected, found = gradients(eager, hidden), gradients(compiled, hidden)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name
    assert 0 < compilation.num_graphs <= most_graphs(compiled, 1)
    assert set(torch._dynamo.utils.counters[COUNTER]) == {"_same_first", "_same_second", "_summed"}
    with torch.no_grad():
        assert torch.equal(compiled(hidden), eager(hidden))  # as samples are drawn: not compiled


@pytest.mark.parametrize("keep", [None, 0.5])
def test_compilations_are_bounded_by_geometries(keep: float | None) -> None:
    """More geometries than torch would compile by default."""
    model = ToyTransformer()
    compilation = Compilation("eager")
    if keep is None:
        compilation.compile_blocks(model)
    else:
        recompute(model, keep, compilation.wrap)
    for _ in range(2):
        for tokens in range(2, 14):
            gradients(model, torch.randn(1, tokens, 16))
    assert most_graphs(model, STATIC) == 2 * STATIC
    assert most_graphs(model, 12) == 2 * (STATIC + 1)
    assert STATIC < compilation.num_graphs <= most_graphs(model, 12)


def test_prompts_of_many_lengths_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of a tiny Qwen-Image-Edit, to the bit: the compiler's own kernels are left out.

    Of one block: with sizes as variables the compiler takes long for each.
    """
    monkeypatch.setattr("qwen_image_finetune.levers.compile.STATIC", 1)
    models = [tiny_transformer("qwen", layers=1) for _ in range(2)]
    for model in models:
        adapters.add_adapter(model.train(), LoraConfig(r=4, target_modules=["to_q", "add_k_proj"]), seed=1)
        disturb(model)
    eager, compiled = models
    compilation = Compilation("aot_eager")
    recompute(compiled, 0.5, compilation.wrap)
    for tokens in (5, 6, 7, 8, 5):
        for model in models:
            model.zero_grad()
            forward(model, text_tokens=tokens).square().sum().backward()
        for (name, expected), found in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            if expected.grad is not None:
                assert torch.equal(found.grad, expected.grad), name
    assert compilation.num_graphs == 2 <= most_graphs(compiled, 4)


@pytest.mark.parametrize(("family", "keep"), [("flux", 0.5), ("qwen", "none")])
def test_blocks_are_compiled_whole(family: str, keep: Any) -> None:
    """With everything that a run puts into them; one piece that no compiler sees through leaves a block eager."""
    model = tiny_transformer(family, layers=1)
    quantize(model, "fp8")
    adapters.add_adapter(model.train(), LoraConfig(r=4), seed=1)
    use_attention(model, "auto", "bf16")
    compilation = Compilation("eager")  # what is in a graph is known before any compiler has it
    recompute(model, keep, compilation.wrap)
    with torch.autocast("cpu", torch.bfloat16):
        forward(model).float().square().sum().backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 0 < compilation.num_graphs <= most_graphs(model, 1)


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_blocks_of_one_kind_share_what_is_compiled(family: str) -> None:
    """With adapters, and without a break in any graph. The compiler is left out: it takes a minute here."""
    model = tiny_transformer(family)
    adapters.add_adapter(model, LoraConfig(r=4), seed=1)
    disturb(model)
    expected = forward(model.train())
    compilation = Compilation("eager")
    recompute(model, 0.0, compilation.wrap)
    found = forward(model)
    found.sum().backward()
    assert torch.equal(expected, found)
    assert compilation.num_graphs == (3 if family == "flux" else 2) == most_graphs(model, 1)
    assert not torch._dynamo.utils.counters["graph_break"]
