"""Block swap: frozen weights wait in host memory and visit the card when their block runs.

A frozen base is never changed, so weights go one way, from the host to the card, and are dropped there after use. Each
swapped block keeps its frozen tensors in one page-locked buffer, so a visit is one copy; while a block computes, the
next swapped one is on its way on a stream of its own. Which comes next follows from the order of the blocks: upwards in
the forward pass, downwards in the backward pass.

A block's weights are dropped after its forward. Recomputation runs that forward again when the block's turn comes in
the backward pass, and what autograd notes down then keeps the copies on the card until they are used. Without
recomputation every copy would stay until the backward pass, and nothing would be won.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from qwen_image_finetune.levers.quantized_linear import QuantizedLinear
from qwen_image_finetune.levers.recompute import blocks

ALIGNMENT = 256  # bytes; where tensors begin in a buffer, as the allocator of a card aligns them
AHEAD = 1  # blocks that are fetched before they are needed


@dataclass(frozen=True)
class Place:
    """A frozen parameter or buffer of a block, and where it lies in the block's buffer."""

    module: nn.Module
    name: str
    dtype: torch.dtype
    shape: torch.Size
    begin: int  # bytes

    def put(self, buffer: Tensor) -> None:
        """Let the module use its part of `buffer` (bytes,) uint8."""
        size = self.shape.numel() * self.dtype.itemsize
        view = buffer[self.begin : self.begin + size].view(self.dtype).view(self.shape)
        # A new object: what autograd noted down keeps the one it has.
        if self.name in self.module._parameters:
            self.module._parameters[self.name] = nn.Parameter(view, requires_grad=False)
        else:
            self.module._buffers[self.name] = view


class SwappedBlock:
    """The frozen tensors of one block, in host memory; page-locked for as long as this lives, if `device` is CUDA's."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        tensors = list(_frozen(block))
        self.places, size = [], 0
        for module, name, tensor in tensors:
            self.places.append(Place(module, name, tensor.dtype, tensor.shape, size))
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        self.host = torch.empty(size, dtype=torch.uint8)
        if device.type == "cuda":
            _page_lock(self.host)
            # The buffer is an argument, so that it outlives the call. At the end of a process nobody needs to be told.
            weakref.finalize(self, _unlock, self.host, device).atexit = False
        for place, (_, _, tensor) in zip(self.places, tensors, strict=True):
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self.host[place.begin : place.begin + content.numel()].copy_(content)
        self.put(self.host)

    def put(self, buffer: Tensor) -> None:
        """Let the block use the tensors in `buffer` (bytes,) uint8."""
        for place in self.places:
            place.put(buffer)


class Swap:
    """Blocks of which some wait in host memory. Made by `swap_blocks`, and kept alive by its hooks."""

    def __init__(self, chain: Sequence[nn.Module], chosen: Sequence[int], device: torch.device) -> None:
        self.device, self.last = device, len(chain) - 1
        self.entered, self.upwards = 0, True
        self.stream = torch.Stream(device) if device.type != "cpu" else None
        self.waiting = {number: SwappedBlock(chain[number], device) for number in chosen}
        self.visiting: dict[int, tuple[Tensor, torch.Event | None]] = {}  # copies on the card, and when they are whole
        for number, block in enumerate(chain):
            block.register_forward_pre_hook(self._hook(self.enter, number))
            # Recomputation ends with an exception as soon as it has everything: the block is left all the same.
            block.register_forward_hook(self._hook(self.leave, number), always_call=True)

    def enter(self, number: int) -> None:
        """Block `number` is about to run: its weights are on the card, the next swapped block's on the way."""
        if number in (0, self.last):  # after the last block comes the backward pass, or nothing
            self.upwards = number == 0
        elif number != self.entered:
            self.upwards = number > self.entered
        self.entered = number
        coming = self._coming(number)
        for stale in self.visiting.keys() - {number, *coming}:
            self._drop(stale)
        if number in self.waiting:
            self._fetch(number)
            self.waiting[number].put(self._whole(number))
        for each in coming:
            self._fetch(each)

    def leave(self, number: int) -> None:
        """Block `number` has run: its copy on the card goes, but for what autograd noted down."""
        if number in self.waiting:
            self.waiting[number].put(self.waiting[number].host)
            self._drop(number)

    def _coming(self, number: int) -> list[int]:
        """The swapped blocks that run next, nearest first."""
        later = [each for each in self.waiting if (each > number if self.upwards else each < number)]
        return sorted(later, reverse=not self.upwards)[:AHEAD]

    def _fetch(self, number: int) -> None:
        if number in self.visiting:
            return
        host = self.waiting[number].host
        card = torch.empty_like(host, device=self.device)
        if self.stream is None:
            self.visiting[number] = (card.copy_(host), None)
            return
        # The memory of `card` may have belonged to something that the main stream has not finished yet.
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            card.copy_(host, non_blocking=True)
        self.visiting[number] = (card, self.stream.record_event())

    def _whole(self, number: int) -> Tensor:
        card, arrived = self.visiting[number]
        if arrived is not None:
            torch.accelerator.current_stream(self.device).wait_event(arrived)
        return card

    def _drop(self, number: int) -> None:
        self._whole(number)  # the copy ends before others get its memory
        del self.visiting[number]

    @staticmethod
    def _hook(act: Callable[[int], None], number: int) -> Callable[..., None]:
        def hook(*arguments: Any) -> None:
            with _disable_current_modes():  # selective checkpointing would take the copies for the block's own work
                act(number)

        return hook


def swap_blocks(transformer: nn.Module, count: int, device: torch.device) -> Swap:
    """Place a transformer on `device`, all but the frozen weights of `count` of its blocks, which stay in host memory.

    Adapters stay on the card. The swapped blocks are spread evenly, so that each copy has others' work to hide behind.
    """
    chain = blocks(transformer)
    swap = Swap(chain, spread(count, len(chain)), device)
    host = {place_of(block.host) for block in swap.waiting.values()}
    transformer._apply(lambda tensor: tensor if place_of(tensor) in host else tensor.to(device))
    for module in transformer.modules():
        if isinstance(module, QuantizedLinear):
            module.will_run_on(device)  # a weight that waits on the host would not tell
    left_alone = [name for name, tensor in _named_tensors(transformer) if place_of(tensor) in host]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, left_alone)
    return swap


def swapped_names(transformer: nn.Module, count: int) -> tuple[str, ...]:
    """How the keys begin of the weights that `swap_blocks` leaves in host memory, so that they need not leave it."""
    chain = blocks(transformer)
    chosen = {chain[number] for number in spread(count, len(chain))}
    return tuple(f"{name}." for name, module in transformer.named_modules() if module in chosen)


def spread(count: int, total: int) -> list[int]:
    """`count` numbers below `total`, evenly apart; all of them where `count` is more."""
    count = min(count, total)
    return [(2 * place + 1) * total // (2 * count) for place in range(count)]


def place_of(tensor: Tensor) -> int:
    """What tensors of one buffer have in common."""
    return tensor.untyped_storage().data_ptr()


def _frozen(block: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    found: list[tuple[nn.Module, str, Tensor]] = []
    for module in block.modules():
        found += [(module, name, p) for name, p in module._parameters.items() if p is not None and not p.requires_grad]
        found += [(module, name, b) for name, b in module._buffers.items() if b is not None]
    return found


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _page_lock(buffer: Tensor) -> None:
    """Make host memory readable by the card directly. torch's own pinned tensors are rounded up to powers of two."""
    status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
    if int(status) != 0:
        raise RuntimeError(
            f"page-locking {buffer.numel() / 2**30:.2f} GiB of host memory failed (CUDA error {int(status)}): raise "
            "the limit of locked memory (ulimit -l), or set train.blocks_to_swap lower"
        )


def _unlock(buffer: Tensor, device: torch.device) -> None:
    """Undo `_page_lock`, before other things get this memory and cannot be page-locked."""
    torch.cuda.synchronize(device)  # copies of it may be on their way
    status = torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
    if int(status) != 0:
        raise RuntimeError(
            f"{buffer.numel() / 2**30:.2f} GiB of host memory stay page-locked (CUDA error {int(status)})"
        )
