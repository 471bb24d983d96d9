"""A LoRA with more than its two factors: the magnitudes of DoRA, and dropout of ranks and of whole modules.

peft's own DoRA reads the weight of the layer as numbers, which a quantised one has not, and makes the whole matrix of a
change at every pass. Here the lengths of rows come from products as small as the rank:

    |w_i + s b_i A|^2 = |w_i|^2 + 2 s (W A^T)_i . b_i + s^2 b_i (A A^T) b_i^T
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from qwen_image_finetune.lora.layers import TINY, Layer
from qwen_image_finetune.lora.targets import lora_layers


@runtime_checkable
class Quantized(Protocol):
    """A frozen layer that stores its weight in fewer bits."""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers, (out, in)."""
        ...


class Variant(LoraVariant):
    """What a LoRA layer does beside adding up(down(x)); one for each layer and adapter.

    Attributes:
        strength: of the whole change, W + strength (W' - W): 0 is the base, as for any other LoRA.
    """

    def __init__(self, layer: LoraLayer, rank_dropout: float, module_dropout: float) -> None:
        self.strength = 1.0
        self.rank_dropout, self.module_dropout = rank_dropout, module_dropout
        self.quantized = isinstance(layer.get_base_layer(), Quantized)  # asked here: compilers follow no protocols

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """`result` (..., out), the output of the base and of adapters before this one, with this one's change.

        Dropout of inputs is for the factors alone; the base sees all of them. Ranks are drawn for each sample, and
        those that stay grow by 1 / (1 - rank_dropout), as in sd-scripts (networks/lora.py).
        """
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        hidden = down(module.lora_dropout[active_adapter](x))
        if module.training and self.rank_dropout:
            shape = (hidden.shape[0], *(1 for _ in hidden.shape[1:-1]), hidden.shape[-1])
            kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
            hidden = hidden * kept / (1 - self.rank_dropout)
        change = up(hidden) * module.scaling[active_adapter]
        if active_adapter in module.lora_magnitude_vector:
            base = module.get_base_layer()
            alone = len(module.active_adapters) == 1
            before = result if alone else base(x)
            before = before if base.bias is None else before - base.bias
            magnitude = module.lora_magnitude_vector[active_adapter].weight
            # A constant for the gradient: section 4.3 of the paper
            factor = magnitude / self.row_lengths(module, active_adapter)
            change = (factor - 1) * before + factor * change
        if module.training and self.module_dropout:
            change = change * (torch.rand((), device=change.device) >= self.module_dropout)
        return result + self.strength * change

    @torch.no_grad()
    def row_lengths(self, module: Any, adapter_name: str) -> Tensor:
        """(out,) float32: lengths of the rows of W + s B A."""
        base, scale = module.get_base_layer(), module.scaling[adapter_name]
        weight = base.dequantised(torch.float32) if self.quantized else base.weight.float()
        down, up = module.lora_A[adapter_name].weight.float(), module.lora_B[adapter_name].weight.float()
        with torch.autocast(weight.device.type, enabled=False):
            crossed = ((weight @ down.T) * up).sum(dim=1)
            squared = ((up @ (down @ down.T)) * up).sum(dim=1)
            return (weight.square().sum(dim=1) + 2 * scale * crossed + scale**2 * squared).clamp(min=TINY).sqrt()


def variant_of(layer: Any, adapter_name: str) -> Variant | None:
    """What an adapter's layer does beyond two factors, where it is a LoRA's."""
    return layer.lora_variant.get(adapter_name) if isinstance(layer, LoraLayer) else None


def install(
    transformer: nn.Module, name: str, dora: bool, rank_dropout: float = 0.0, module_dropout: float = 0.0
) -> None:
    """Give an adapter magnitudes, which change nothing yet, and dropouts."""
    if not (dora or rank_dropout or module_dropout):
        return
    cast(Any, transformer).peft_config[name].use_dora = dora  # not before: peft would make its own
    for _, layer in lora_layers(transformer, name):
        layer.lora_variant[name] = Variant(layer, rank_dropout, module_dropout)
        if dora:
            magnitude = DoraLinearLayer(fan_in_fan_out=False)
            device = cast(nn.Linear, layer.lora_A[name]).weight.device
            magnitude.weight = nn.Parameter(torch.ones(layer.out_features, device=device))
            layer.lora_magnitude_vector[name] = magnitude
            layer.use_dora[name] = True
            start_magnitudes(layer, name)


def start_magnitudes(layer: LoraLayer, name: str) -> None:
    """The lengths that rows have: nothing changes by them. Where the base has no memory, nothing is computed."""
    variant = variant_of(layer, name)
    if name in layer.lora_magnitude_vector and cast(Any, layer.get_base_layer()).weight.device.type != "meta":
        assert variant is not None
        cast(Any, layer.lora_magnitude_vector[name]).weight.data.copy_(variant.row_lengths(layer, name))


def fill_magnitudes(layer: LoraLayer, name: str, magnitude: Tensor | None) -> None:
    """The magnitudes of a file; of a LoRA without any, the lengths that rows have with its factors."""
    if magnitude is None:
        start_magnitudes(layer, name)
    elif name in layer.lora_magnitude_vector:
        cast(Any, layer.lora_magnitude_vector[name]).weight.data.copy_(magnitude)


def with_magnitude(found: Layer, magnitude: Tensor, layer: LoraLayer) -> Layer:
    """A LoRA of these factors on a layer, with magnitudes (out,), and what ComfyUI takes in their place."""
    weight = _numbers(layer.get_base_layer()).to(magnitude.device)
    changed = torch.linalg.norm(weight + found.delta().to(weight.device), dim=1).clamp(min=TINY)
    return replace(found, magnitude=magnitude, dora_scale=magnitude * torch.linalg.norm(weight, dim=1) / changed)


def _numbers(base: nn.Module) -> Tensor:
    """The weight of a frozen layer, float32."""
    return base.dequantised(torch.float32) if isinstance(base, Quantized) else cast(nn.Linear, base).weight.float()
