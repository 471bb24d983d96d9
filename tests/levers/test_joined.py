"""Narrow products joined in compiled graphs: the same numbers, fewer products, and what must stay apart does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from tiny_transformers import disturb, forward, tiny_transformer
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.levers import joined
from qwen_image_finetune.levers.joined import COUNTER, JoinNarrowProducts
from qwen_image_finetune.levers.recompute import recompute
from qwen_image_finetune.lora import adapters


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def joining(products: list[int] | None = None) -> Any:
    """A compiler that does nothing else; it notes how many products each graph has afterwards."""

    def compiled(graph: GraphModule, inputs: Any) -> Any:
        JoinNarrowProducts()(graph.graph)
        graph.recompile()
        if products is not None:
            products.append(sum(node.target is joined.MM for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    # As inductor cuts the graph of both passes in two; this also finds what is computed twice.
    return aot_autograd(fw_compiler=compiled, bw_compiler=compiled, partition_fn=min_cut_rematerialization_partition)


class Adapted(nn.Module):
    """Three pairs of factors on one input, as an attention has them."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(rank, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([up(down(x)).sin() for down, up in zip(self.down, self.up, strict=True)])


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(x).square().sum(), [x, *model.parameters()])


@pytest.mark.parametrize("dynamic", [False, True])
def test_three_pairs_are_read_at_once(dynamic: bool) -> None:
    """Forward one product in place of three, backward one for three factors and one for the input."""
    products: list[int] = []
    model = Adapted(24, 4)
    compiled = torch.compile(model, backend=joining(products), dynamic=dynamic)
    for tokens in (40, 50) if dynamic else (40,):
        x = torch.randn(tokens, 24, requires_grad=True)
        for ours, theirs in zip(gradients(compiled, x, model), gradients(model, x, model), strict=True):
            assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
    # Forward x A three times and B three times; backward three products each for A, B, hidden and x.
    assert products == [6 - 2, 12 - 2 - 2]
    assert counters[COUNTER] == {"_same_first": 1, "_same_second": 1, "_summed": 1}


def chained(x: Tensor, down: Tensor, other: Tensor) -> Tensor:
    first = x @ down
    return x @ (other * first.mean()) + first  # waits for the first product


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (chained, [(40, 24), (24, 4), (24, 4)]),
        (lambda x, *factors: torch.stack([x @ factor for factor in factors]), [(40, 24), (24, 24), (24, 24)]),  # wide
    ],
)
def test_what_stays_apart(function: Callable[..., Tensor], shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    assert torch.equal(torch.compile(function, backend=joining(), dynamic=False)(*inputs), function(*inputs))
    assert not counters[COUNTER]


@pytest.mark.parametrize(("family", "keep"), [("flux", None), ("qwen", 0.5)])
def test_gradients_of_a_model(family: str, keep: Any) -> None:
    """Of every factor, within 1e-5 of its norm: float32, sums in another order."""
    models = [tiny_transformer(family, layers=1 if family == "flux" else 2) for _ in range(2)]
    for model in models:
        adapters.add_adapter(model.train(), LoraConfig(r=2), seed=1)
        disturb(model)
    backend = joining()
    recompute(models[1], keep or "none", lambda run: torch.compile(run, backend=backend, dynamic=False))
    for model in models:
        forward(model).square().sum().backward()
    for (name, expected), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if expected.grad is not None:
            assert float((found.grad - expected.grad).norm()) <= 1e-5 * float(expected.grad.norm()), name
    assert set(counters[COUNTER]) == {"_same_first", "_same_second", "_summed"}, counters[COUNTER]
