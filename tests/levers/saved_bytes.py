"""Bytes that wait for the backward pass, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, run: Callable[[Any], Any]) -> int:
    """Bytes of the distinct storages, but for weights, that wait for the backward pass after `run(model)`."""
    storages: dict[int, int] = {}
    alive = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(run(model))
    return sum(storages.values())
