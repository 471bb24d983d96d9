"""Activations wait for the backward pass in host memory.

Everything that autograd saves while the transformer runs is copied to the host, and back when the backward pass asks;
with recomputation these are the inputs of the blocks and the outputs that selective checkpointing keeps. On a card the
copies go through page-locked memory on a stream of their own, and those that will be asked for next are fetched
ahead. Weights are left where they are, and so are small tensors, which would cost more time than they free memory.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1 << 20  # bytes; smaller tensors stay
AHEAD = 2  # tensors that are fetched before they are asked for: what one block keeps


class Offloaded:
    """One saved tensor in host memory."""

    def __init__(self, tensor: Tensor, stream: torch.Stream | None, before: Offloaded | None) -> None:
        self.device, self.stream, self.before = tensor.device, stream, before
        self.layout = tensor.size(), tensor.stride()
        self.taken = False
        self.returned: Tensor | None = None
        self.arrived: torch.Event | None = None
        # The stretch of memory that the tensor lies in: it comes back with the strides that it had.
        length = 1 + sum((size - 1) * stride for size, stride in zip(*self.layout, strict=True))
        stretch = tensor.detach().as_strided((length,), (1,))
        self.host = torch.empty(length, dtype=tensor.dtype, pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(stretch)
            return
        stream.wait_stream(torch.accelerator.current_stream(self.device))  # the tensor is computed
        with stream:
            self.host.copy_(stretch, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Begin to copy the tensor back."""
        if self.returned is not None:
            return
        self.returned = torch.empty_like(self.host, device=self.device)
        if self.stream is None:
            self.returned.copy_(self.host)
            return
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))  # whose memory it was is done with it
        with self.stream:
            self.returned.copy_(self.host, non_blocking=True)
        self.arrived = self.stream.record_event()

    def take(self) -> Tensor:
        """The tensor, on its device again; those that were saved before it are fetched meanwhile."""
        self.fetch()
        self.taken = True
        place, self.before = self.before, None
        for _ in range(AHEAD):
            if place is None or place.taken:  # one operation asks for what it saved in the order of saving
                break
            place.fetch()
            place = place.before
        if self.arrived is not None:
            torch.accelerator.current_stream(self.device).wait_event(self.arrived)
        assert self.returned is not None
        # A graph that is kept may ask again, and then pays for another copy.
        stretch, self.returned, self.arrived = self.returned, None, None
        return stretch.as_strided(*self.layout)

    def __del__(self) -> None:
        if self.arrived is not None:  # fetched, never taken: the copy ends before others get its memory
            torch.accelerator.current_stream(self.device).wait_event(self.arrived)


class Offload:
    """Saved-tensor hooks around each run of a transformer."""

    def __init__(self, transformer: nn.Module, smallest: int = SMALLEST) -> None:
        self.transformer, self.smallest = transformer, smallest
        self.bytes = 0  # that wait on the host, of the run so far
        self._weights: set[int] = set()
        self._latest: Offloaded | None = None
        self._stream: torch.Stream | None = None
        self._running = ExitStack()
        transformer.register_forward_pre_hook(self._begin)
        transformer.register_forward_hook(self._end, always_call=True)

    def pack(self, tensor: Tensor) -> Tensor | Offloaded:
        """What autograd keeps in place of a tensor: small ones and weights stay as they are."""
        size = tensor.numel() * tensor.element_size()
        if size < self.smallest or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        if self._stream is None and tensor.device.type != "cpu":
            self._stream = torch.Stream(tensor.device)
        self.bytes += size
        self._latest = Offloaded(tensor, self._stream, self._latest)
        return self._latest

    @staticmethod
    def unpack(saved: Tensor | Offloaded) -> Tensor:
        """The tensor again, on the device where it was."""
        return saved.take() if isinstance(saved, Offloaded) else saved

    def _begin(self, *arguments: Any) -> None:
        self.bytes, self._latest = 0, None
        if torch.is_grad_enabled():
            tensors = [*self.transformer.parameters(), *self.transformer.buffers()]
            self._weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            self._running.enter_context(torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack))

    def _end(self, *arguments: Any) -> None:
        self._running.close()
