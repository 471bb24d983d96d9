"""What loading holds in memory, counted by tensors and not by a clock or the system."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors of 16 and more bits that operations make and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.element_size() >= 2:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if tensor.is_meta or place in self.seen:
            return
        self.seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.seen.discard(place)
            self.now -= size

        weakref.finalize(storage, gone)
