"""The obvious way to merge an adapter, with what `adapter_layers` says of it."""

from __future__ import annotations

from typing import Any

import torch

from qwen_image_finetune.lora import adapters


def merge(model: Any, strength: float = 1.0) -> None:
    """Add what the adapter does to the weights under it, and take it off."""
    with torch.no_grad():
        for name, layer in adapters.adapter_layers(model, "default").items():
            weight = model.get_submodule(name).get_base_layer().weight
            weight += strength * layer.change(weight)
    adapters.remove(model)
