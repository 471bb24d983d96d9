"""Bytes that wait for the backward pass, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd, or selective checkpointing beside it, keeps after `run`."""
    storages: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Tensor) and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(run())
    return sum(storages.values())
