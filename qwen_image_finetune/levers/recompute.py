"""Recomputation of activations in the backward pass, sparing what costs the most time for its memory.

Selective checkpointing, block by block: of everything computed in a block its input is kept, and
- the outputs of attention: they cost most by far for the memory they take (time grows with the square of the tokens);
- a share of the outputs of the other products, by time gained for each byte. A product (rows, k) x (k, n) takes 2 k
  operations for each number of its output, so those with the largest k come first. Which ones a block computes is seen
  by running it once for each geometry.
Keeping changes no result: the same numbers are kept or computed once more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Keep = float | Literal["none"]
Runner = Callable[..., Any]  # (block, numbers of the products kept, *arguments) -> the block's result

_ATEN = torch.ops.aten
# Which argument of a product is its first factor, (rows, k).
PRODUCTS: dict[Any, int] = {
    _ATEN.mm.default: 0, _ATEN.addmm.default: 1, _ATEN._scaled_mm.default: 0, _ATEN._int_mm.default: 0,
}  # fmt: skip
# Torches from 2.12 on ask whether offloading sees kept outputs as well; older ones keep them on the card.
_OPTIONS: dict[str, Any] = (
    {"respect_saved_tensors_hooks": True}
    if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
    else {}
)


def recompute(transformer: nn.Module, keep: Keep, wrap: Callable[[Runner], Runner] = lambda run: run) -> None:
    """Let every block of a diffusers transformer keep little of what its backward pass needs.

    Args:
        keep: share of the outputs of products that is kept besides those of attention; "none" keeps neither.
        wrap: put around the run of a block, recomputation included; the compiler, say, which so sees both passes.
    """
    chosen = Choice(keep) if isinstance(keep, float) else None

    def run(block: nn.Module, kept: frozenset[int], *arguments: Any) -> Any:
        if chosen is None:
            return checkpoint(block, *arguments, use_reentrant=False)
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=partial(_contexts, kept), **_OPTIONS)

    wrapped = wrap(run)

    def run_block(block: nn.Module, *arguments: Any) -> Any:
        kept = frozenset[int]() if chosen is None else chosen.of(block, arguments)
        return wrapped(block, kept, *arguments)

    cast(Any, transformer).enable_gradient_checkpointing(run_block)


def blocks(transformer: nn.Module) -> list[nn.Module]:
    """The repeated blocks, in the order in which they run."""
    repeated = cast(Any, transformer)._repeated_blocks
    return [module for module in transformer.modules() if type(module).__name__ in repeated]


def is_attention(operator: Any) -> bool:
    """Whether an operator is a fused attention, torch's own or that of a library: they all say so."""
    return any(word in operator.name().lower() for word in ("attention", "attn"))


@dataclass(frozen=True)
class Product:
    """One matrix product of a block."""

    k: int  # width of its factors: it takes 2 k operations for each number of its output
    size: int  # bytes of its output
    operations: int = 0


class Choice:
    """Which products of a block are kept, by geometry: those of the largest k that fit into a share of all bytes."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._known: dict[Any, frozenset[int]] = {}

    def of(self, block: nn.Module, arguments: Sequence[Any]) -> frozenset[int]:
        """Numbers of the products, in the order in which the block computes them."""
        if self.share == 0.0:
            return frozenset()
        shapes = tuple(tuple(item.shape) for item in arguments if isinstance(item, Tensor))
        key = (id(block), shapes)
        if key not in self._known:
            self._known[key] = choose(products_of(block, arguments), self.share)
        return self._known[key]


def choose(products: Sequence[Product], share: float) -> frozenset[int]:
    """Most time gained for each byte first, as long as there is room.

    The last product is left out: recomputation ends before it, with the last thing that the backward pass asks for.
    """
    room = share * sum(product.size for product in products[:-1])
    chosen = set()
    for number, product in sorted(enumerate(products[:-1]), key=lambda item: -item[1].k):
        if product.size <= room:
            chosen.add(number)
            room -= product.size
    return frozenset(chosen)


class _Recorder(TorchDispatchMode):
    """Notes the products among the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator in PRODUCTS:
            self.products.append(Product(args[PRODUCTS[operator]].shape[1], result.numel() * result.element_size()))
        return result


def products_of(block: nn.Module, arguments: Sequence[Any]) -> list[Product]:
    """The products of one run of a block, seen by running it once; the random state is not moved."""
    devices = {item.device for item in arguments if isinstance(item, Tensor)}
    cards = [device for device in devices if device.type == "cuda"]
    with torch.no_grad(), torch.random.fork_rng(devices=cards), ExitStack() as stack:
        for kind in {device.type for device in devices}:
            # Weights cast here would be found again by the run that trains them, cut off from their gradients.
            dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        recorder = stack.enter_context(_Recorder())
        block(*arguments)
    return recorder.products


class Policy:
    """What is kept of one run of a block: asked for each operator in order."""

    def __init__(self, chosen: frozenset[int]) -> None:
        self.chosen = chosen
        self.counted = {False: 0, True: 0}  # older torches ask again while they recompute

    def __call__(self, context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        if is_attention(operator):
            return CheckpointPolicy.MUST_SAVE
        if operator in PRODUCTS:
            number = self.counted[context.is_recompute]
            self.counted[context.is_recompute] += 1
            if number in self.chosen:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(chosen: frozenset[int]) -> Any:
    return create_selective_checkpoint_contexts(Policy(chosen))
