"""What a step needs, from shapes alone: bytes that wait for the backward pass, and operations.

One block of each kind is run with tensors that have shapes and no memory, by the family's own `velocity`, with
the adapter in place; what autograd would save is counted. The full-size models take seconds, on any machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.levers.recompute import PRODUCTS, Product, blocks, choose, is_attention
from qwen_image_finetune.lora.adapters import add_adapter
from qwen_image_finetune.records import Batch


@dataclass
class BlockFootprint:
    """One run of one block."""

    count: int = 0  # blocks of this kind in the model
    weights: int = 0  # numbers
    linear: int = 0  # of them, those that quantisation stores in fewer bits
    input_sizes: list[int] = field(default_factory=list)  # bytes of each tensor that full recomputation keeps
    saved_sizes: list[int] = field(default_factory=list)  # of each that is kept without recomputation
    attention_sizes: list[int] = field(default_factory=list)  # of each output of attention
    attention_operations: int = 0  # forward
    operations: int = 0  # forward, of everything else
    products: list[Product] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """Bytes of what full recomputation keeps."""
        return sum(self.input_sizes)

    @property
    def saved(self) -> int:
        """Bytes of what is kept without recomputation."""
        return sum(self.saved_sizes)

    def kept(self, keep: float | str | None) -> list[int]:
        """Bytes of each tensor that waits for the backward pass.

        Args:
            keep: as in train.keep_activations; None without recomputation.
        """
        if keep is None:
            return self.saved_sizes
        if keep == "none":
            return self.input_sizes
        chosen = choose(self.products, float(keep))
        kept = [*self.input_sizes, *self.attention_sizes, *(self.products[number].size for number in chosen)]
        return min(kept, self.saved_sizes + self.input_sizes, key=sum)

    def recomputed(self, keep: float | str | None) -> int:
        """Operations that are done a second time, attention aside."""
        if keep is None:
            return 0
        chosen = choose(self.products, float(keep)) if keep != "none" else ()
        return self.operations - sum(self.products[number].operations for number in chosen)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one forward and backward pass, with whatever is done twice."""

    products: int
    attention_forward: int
    attention_backward: int  # 2.5 times one forward: five products in place of two

    @property
    def together(self) -> int:
        """The sum."""
        return self.products + self.attention_forward + self.attention_backward


@dataclass(frozen=True)
class Footprint:
    """A model and one geometry."""

    kinds: dict[str, BlockFootprint]
    weights_outside: int  # numbers of weights that are in no block
    adapter: int  # numbers in the adapter
    trained_everything: bool
    largest: int = 0  # numbers in the largest weight

    @property
    def weights(self) -> int:
        """Numbers in all weights, the adapter aside."""
        return self.weights_outside + sum(kind.count * kind.weights for kind in self.kinds.values())

    @property
    def num_blocks(self) -> int:
        """Repeated blocks of all kinds."""
        return sum(kind.count for kind in self.kinds.values())

    @property
    def product_numbers(self) -> int:
        """Numbers in the outputs of all products of one forward pass, in 16 bits."""
        return sum(kind.count * sum(product.size for product in kind.products) for kind in self.kinds.values()) // 2

    def kept(self, keep: float | str | None) -> int:
        """Bytes that all blocks together keep."""
        return sum(kind.count * sum(kind.kept(keep)) for kind in self.kinds.values())

    def kept_on_host(self, keep: float | str | None) -> int:
        """Bytes of the host's memory that the same takes there.

        torch rounds each page-locked tensor up to a power of two (PowerOf2Ceil in ATen/core/CachingHostAllocator.h).
        """
        return sum(
            kind.count * (1 << (size - 1).bit_length()) for kind in self.kinds.values() for size in kind.kept(keep)
        )

    def work(self, keep: float | str | None, preserves: bool = False) -> Work:
        """Operations by what computes them.

        A frozen layer has one product in the backward pass, for the gradient of its input; a trained one has two.

        Args:
            preserves: with loss.preservation: another such pair of passes, and a forward pass of the base.
        """
        kinds, backward = self.kinds.values(), 2 if self.trained_everything else 1
        attention = sum(kind.count * kind.attention_operations for kind in kinds)
        forward = sum(kind.count * kind.operations for kind in kinds)
        pairs = 2 if preserves else 1
        products = (1 + backward) * forward + sum(kind.count * kind.recomputed(keep) for kind in kinds)
        return Work(
            products=pairs * products + preserves * forward,
            attention_forward=attention * (pairs * (2 if keep == "none" else 1) + preserves),
            attention_backward=pairs * int(2.5 * attention),
        )

    def operations(self, keep: float | str | None, preserves: bool = False) -> int:
        """All floating-point operations of one forward and backward pass, and of those of `preserves`."""
        return self.work(keep, preserves).together


class _Watch(TorchDispatchMode):
    """Adds what runs under it to the footprint of the block that is running."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: BlockFootprint | None = None

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        block = self.running
        if block is None:
            return result
        if is_attention(operator):
            outputs = [item for item in result if isinstance(item, Tensor)] if isinstance(result, tuple) else [result]
            block.attention_sizes += [_size(item) for item in outputs]
            batch, heads, rows, width = args[0].shape
            block.attention_operations += 4 * batch * heads * rows * args[1].shape[2] * width
        elif operator in PRODUCTS:
            k = args[PRODUCTS[operator]].shape[1]
            block.products.append(Product(k, _size(result), 2 * k * result.numel()))
            block.operations += 2 * k * result.numel()
        elif operator.overloadpacket in flop_registry:
            block.operations += flop_registry[operator.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class _Layouts(TorchDispatchMode):
    """Computes integers: some models lay their sequence out by the values of masks, and shapes follow from that."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        dtypes = {tensor.dtype for tensor in tensors} or {kwargs.get("dtype") or torch.float32}
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if fake or any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
            return operator(*args, **kwargs)
        with unset_fake_temporarily():
            return operator(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Around running a model for its shapes: tensors of numbers have no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Layouts():  # type: ignore[no-untyped-call]
        yield


def footprint(
    family: Family,
    transformer_config: dict[str, Any],
    batch: Batch,
    lora: LoraConfig | None,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
) -> Footprint:
    """Measure a transformer of this configuration.

    Args:
        batch: shapes of one micro-batch; its values are not looked at.
        lora: the adapter; None trains everything.
        dtype: of the forward pass.
        adapter_dtype: of the weights that are trained.
    """
    with init_empty_weights():
        model: Any = cast(Any, family.transformer).from_config(transformer_config)
    kinds: dict[str, BlockFootprint] = {}
    for block, place in places(model).items():
        linear = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
        kind = kinds.setdefault(place, BlockFootprint(weights=_numbers(block), linear=linear))
        kind.count += 1
    outside = _numbers(model) - sum(kind.count * kind.weights for kind in kinds.values())
    largest = max(parameter.numel() for parameter in model.parameters())
    _shorten(model)
    adapter = 0
    if lora is None:
        model.requires_grad_(True)
    else:
        add_adapter(model, lora.model_copy(update={"init_lora_weights": True}), seed=0)
        for block, place in places(model).items():
            added = sum(p.numel() for p in block.parameters() if p.requires_grad)
            adapter += kinds[place].count * added
    with without_memory(), warnings.catch_warnings():
        # Norms of a model that is trained itself are in float32; that no fused kernel takes them is of no use here.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        # What is trained keeps its own precision, whatever the forward pass computes in.
        replace_parameters(model, lambda parameter: adapter_dtype if parameter.requires_grad else dtype)
        _run(family, model, batch, kinds, dtype, mixed=adapter_dtype != dtype)
    return Footprint(kinds, outside, adapter, lora is None, largest)


def _run(
    family: Family, model: Any, batch: Batch, kinds: dict[str, BlockFootprint], dtype: torch.dtype, mixed: bool
) -> None:
    """Fill in what the run of one block of each kind takes."""
    watch, kind_of = _Watch(), places(model)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    seen: set[int] = set()
    alive = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # The input of the very first block may need no gradient; it stands for all of its kind here.
        kwargs = {name: _with_gradient(item) if "hidden_states" in name else item for name, item in kwargs.items()}
        watch.running = kinds[kind_of[module]]  # once for each row, where a model takes one after the other
        watch.running.input_sizes += [_size(item) for item in kwargs.values() if isinstance(item, Tensor)]
        return args, kwargs

    def end(*arguments: Any) -> None:
        watch.running = None

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if watch.running is not None and storage._cdata not in own | seen:
            seen.add(storage._cdata)
            watch.running.saved_sizes.append(storage.nbytes())
        alive.append(tensor)  # or its storage would be given to another
        return tensor

    for block in kind_of:
        block.register_forward_pre_hook(begin, with_kwargs=True)
        block.register_forward_hook(end)
    guidance = 1.0 if family.distilled_guidance(model.config) else None
    timestep = torch.empty(batch.target.shape[0])
    saving = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.autocast("cpu", dtype, enabled=mixed and dtype != torch.float32), watch, saving:
        family.velocity(model, batch.target, timestep, batch, guidance)


def usual_sizes(family: Family, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(width, height) of a target and, where the family takes any, of one reference like it."""
    return (size,) * (1 + bool(family.max_references))


def places(model: Any) -> dict[nn.Module, str]:
    """The name of the list that each repeated block is in. Blocks of a list are of one kind: they see equal tokens."""
    names = {module: name for name, module in model.named_modules()}
    return {block: names[block].rpartition(".")[0] for block in blocks(model)}


def stand_in(
    family: Family, transformer_config: dict[str, Any], sizes: Sequence[tuple[int, int]], rows: int, text_tokens: int
) -> Batch:
    """A batch of zeros.

    Args:
        sizes: (width, height) in pixels of the target and each reference.
        rows: samples.
        text_tokens: of each prompt.
    """
    if family.references_follow:
        sizes = [sizes[0]] * len(sizes)
    shapes = [family.latent_shape(*size, transformer_config) for size in sizes]
    latents = [torch.zeros(rows, *shape) for shape in shapes]
    one = family.stand_in_text(text_tokens, shapes[1:], transformer_config)
    text = {name: torch.stack([tensor] * rows) for name, tensor in one.items()}
    batch = Batch(tuple("" for _ in range(rows)), latents[0], tuple(latents[1:]), text)
    return batch.to("cpu", torch.bfloat16)


def replace_parameters(model: nn.Module, dtype_of: Callable[[nn.Parameter], torch.dtype]) -> None:
    """Give every parameter new memory, which is none under a fake tensor mode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype_of(parameter))
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _with_gradient(item: Any) -> Any:
    return item.detach().requires_grad_() if isinstance(item, Tensor) and item.dim() == 3 else item


def _shorten(model: Any) -> None:
    """Leave one block of each kind."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and type(module[0]).__name__ in model._repeated_blocks:
            del module[1:]


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
