"""Compilation block by block, with static shapes.

Blocks of one kind share what is compiled: their weights are its arguments. So there is one compilation for each kind of
block and geometry, and one more for the first block, whose input needs no gradient. Sampling runs uncompiled: its
shapes (no gradient, batch of one) would be compiled for a few pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qwen_image_finetune.levers.joined import JoinNarrowProducts
from qwen_image_finetune.levers.recompute import Keep, Runner, recompute
from qwen_image_finetune.levers.rotation import use_real_rotation

# torch stops compiling a function silently after eight shapes; the number of geometries is the bound here.
MOST_GRAPHS = 1 << 12
# Sizes of pictures, text and batch that get kernels of their own. Prompts can have hundreds of lengths, and each would
# take a compilation: those beyond share kernels whose sizes are variables, which fits all of them.
STATIC = 8
# Of inductor, the compiler of torch; others that are named (for tests) take none.
OPTIONS: dict[str, Any] = {"post_grad_custom_pre_pass": JoinNarrowProducts()}


class Compilation:
    """Compiles the blocks of one transformer, and counts."""

    def __init__(self, backend: str = "inductor") -> None:
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        torch._dynamo.config.accumulated_recompile_limit = MOST_GRAPHS
        self.backend = backend
        self.geometries: set[tuple[torch.Size, ...]] = set()  # shapes that blocks were called with, whatever the kind
        self.static: set[tuple[torch.Size, ...]] = set()  # of them, those with kernels of their own
        self._before = _num_graphs()

    @property
    def num_graphs(self) -> int:
        """Compilations so far."""
        return _num_graphs() - self._before

    def wrap(self, run: Runner) -> Runner:
        """`run` (block, ..., *arguments), compiled; for `recompute`."""
        options = OPTIONS if self.backend == "inductor" else None
        static = torch.compile(run, dynamic=False, backend=self.backend, options=options)
        symbolic = torch.compile(run, dynamic=True, backend=self.backend, options=options)

        def run_compiled(*arguments: Any) -> Any:
            geometry = tuple(item.shape for item in arguments if isinstance(item, Tensor))
            if geometry not in self.geometries and len(self.geometries) < STATIC:
                self.static.add(geometry)
            self.geometries.add(geometry)
            compiled = static if geometry in self.static else symbolic
            return compiled(*(_canonical(item) for item in arguments))

        return run_compiled

    def compile_blocks(self, transformer: nn.Module) -> None:
        """Compile every block of a diffusers transformer without recomputation, where gradients are computed."""
        run: Callable[..., Any] = self.wrap(_run)
        cast(Any, transformer).enable_gradient_checkpointing(run)  # diffusers' one place to say how a block is run

    def words(self) -> str:
        """How often what was compiled."""
        if self.geometries and self.num_graphs == 0:
            return "train.compile: nothing could be compiled, blocks run as they are; TORCH_LOGS=graph_breaks says why"
        return f"compiled {self.num_graphs} graphs for {len(self.geometries)} sizes of pictures, text and batch"


_compilations: WeakKeyDictionary[nn.Module, Compilation] = WeakKeyDictionary()


def compile_transformer(transformer: nn.Module, keep: Keep | None) -> None:
    """Compile the blocks, with their recomputation (see `recompute`); None for none."""
    use_real_rotation()
    compilation = _compilations[transformer] = Compilation()
    if keep is None:
        compilation.compile_blocks(transformer)
    else:
        recompute(transformer, keep, compilation.wrap)


def compilation_of(transformer: nn.Module) -> Compilation | None:
    """What `compile_transformer` counts; None for a transformer that is not compiled."""
    return _compilations.get(transformer)


def _run(block: nn.Module, *arguments: Any) -> Any:
    return block(*arguments)


def _canonical(item: Any) -> Any:
    """A tensor with the strides that follow from its shape: else an axis of length one may ask for a compilation."""
    return item.reshape(-1).view(item.shape) if isinstance(item, Tensor) else item


def _num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])
