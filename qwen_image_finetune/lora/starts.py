"""Where the factors of a LoRA start: at random, or at a part that is taken out of the base."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError

INITIAL = "_initial"  # ending of the name of the frozen adapter that subtracts a starting point
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def factors(layer: LoraLayer, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
    """The two factors (lora_A, lora_B) of one adapter in a layer."""
    return cast(nn.Linear, layer.lora_A[adapter_name]), cast(nn.Linear, layer.lora_B[adapter_name])


def base_layer(layer: LoraLayer) -> nn.Linear:
    """The frozen layer under an adapter."""
    return cast(nn.Linear, layer.get_base_layer())


def initialise(layer: LoraLayer, name: str, initialisation: bool | str) -> tuple[Tensor, Tensor] | None:
    """Set the weights of one layer; returns (A0, B0) where they are a part taken out of the base.

    Random weights are drawn on the CPU in float32, so that they depend on the seed and not on device or dtype.
    """
    if isinstance(initialisation, str) and _needs_base(initialisation):
        return _initialise_from_base(layer, name, initialisation)
    pair = factors(layer, name)
    device = pair[0].weight.device
    without_memory = device.type == "meta"  # a base that is filled later, once it is cut; the adapter is there now
    if without_memory:
        device = torch.device("cpu")
    for factor in pair:
        factor.to_empty(device="cpu") if without_memory else factor.to("cpu")
        factor.reset_parameters()  # all that `false` does: both factors random
    if initialisation == "orthogonal":
        layer.orthogonal_init(name)
    else:
        layer.reset_lora_parameters(name, initialisation)
    for factor in pair:
        factor.to(device=device, dtype=torch.float32)
    return None


def check_rank(initialisation: bool | str, rank: int, shape: tuple[int, int]) -> None:
    """
    Raises:
        ConfigError: so many directions are to be taken out of a matrix that has fewer.
    """
    if isinstance(initialisation, str) and _needs_base(initialisation) and rank > min(shape):
        raise ConfigError(
            f"model.lora.init_lora_weights={initialisation!r}: model.lora.r={rank} is more than a layer of {shape} has "
            f"directions; use at most {min(shape)}, or other target_modules"
        )


def _initialise_from_base(layer: LoraLayer, name: str, initialisation: str) -> tuple[Tensor, Tensor]:
    base = base_layer(layer)
    dtype = base.weight.dtype
    check_rank(initialisation, layer.r[name], (base.out_features, base.in_features))
    key = f"model.lora.init_lora_weights={initialisation!r}"
    if dtype not in FLOATS:
        raise ConfigError(
            f'{key} decomposes the base, which is quantised ({dtype}); use true or "gaussian", or '
            "set model.quantize=false"
        )
    original = base.weight.data
    base.weight.data = original.float().clone()  # peft subtracts from this copy, for OLoRA in place
    if initialisation == "olora":
        layer.olora_init(name)
    else:
        layer.pissa_init(name, initialisation)
    base.weight.data = original
    down, up = factors(layer, name)
    return down.weight.data.clone(), up.weight.data.clone()


def fill(layer: LoraLayer, name: str, down: Tensor, up: Tensor) -> None:
    with torch.no_grad():
        for factor, value in zip(factors(layer, name), (down, up), strict=True):
            factor.weight.copy_(value)


def _needs_base(initialisation: str) -> bool:
    return initialisation.startswith(("pissa", "olora"))
