"""The kinds of adapters, `model.lora.type`: what peft calls their parts, and what they are in a file. One table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.lora.layers import Changed, Layer
from qwen_image_finetune.lora.metadata import peft_fields
from qwen_image_finetune.lora.modules import HadamardModel, KroneckerModel, RotationModel
from qwen_image_finetune.lora.names import exactly
from qwen_image_finetune.lora.other_layers import Hadamard, Kronecker, Rotation, matrices
from qwen_image_finetune.lora.variants import fill_magnitudes

Parts = Mapping[str, Tensor]  # of one layer, by the names of `Kind.parts`


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        title: what it is called.
        tuner: peft's class that puts it into a model.
        layer: peft's class of its layers.
        config: peft's configuration, from ours and the fields that all kinds have.
        parts: names under which a layer keeps tensors: a module each, or a parameter.
        changed: what tensors of a layer, with a scale, do to a weight.
        start: gives the parts of a layer their first values, in float32, drawn on the CPU; None of a LoRA, which has
            more than one way to start (starts.py).
        put: gives them those of a file, whatever their shapes.
        config_of: peft's configuration for the layers of a file, to be filled by `put`.
        rank_of: the tensor of a checkpoint whose rows are as many as the rank; None where none shows it.
    """

    title: str
    tuner: type[BaseTuner]
    layer: type[BaseTunerLayer]
    config: Callable[..., peft.PeftConfig]
    parts: tuple[str, ...]
    changed: Callable[[Parts, float], Changed]
    start: Callable[[Any, str], None] | None
    put: Callable[[Any, str, Changed], None]
    config_of: Callable[[Mapping[str, Any]], peft.PeftConfig]
    rank_of: str | None = None

    def rank_counts(self, layers: Mapping[str, Changed]) -> bool:
        """Whether the rank of layers of a file decides their shapes: a LoKr's may be above that of its matrices."""
        return self.rank_of is not None and all(self.rank_of in layer.tensors for layer in layers.values())


def _lora(config: LoraConfig, **common: Any) -> peft.PeftConfig:
    return peft.LoraConfig(
        lora_alpha=common.pop("alpha"),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        **common,
    )


def _lokr(config: LoraConfig, **common: Any) -> peft.PeftConfig:
    return peft.LoKrConfig(decompose_factor=config.decompose_factor, **common)


def _loha(config: LoraConfig, **common: Any) -> peft.PeftConfig:
    return peft.LoHaConfig(**common)


def _oft(config: LoraConfig, **common: Any) -> peft.PeftConfig:
    """With the whole Cayley transform: peft's default of five terms of its series turns only about right."""
    return peft.OFTConfig(
        r=0, oft_block_size=config.oft_block_size, use_cayley_neumann=False, target_modules=common["target_modules"]
    )


def _lora_of(layers: Mapping[str, Any]) -> peft.PeftConfig:
    return peft.LoraConfig(**{**peft_fields(layers, exactly(layers)), "use_dora": False})  # magnitudes are ours


def _matrices_of(config: type[peft.PeftConfig]) -> Callable[[Mapping[str, Any]], peft.PeftConfig]:
    return lambda layers: cast(Any, config)(r=1, alpha=1, target_modules=exactly(layers))


def _oft_of(layers: Mapping[str, Any]) -> peft.PeftConfig:
    side = next(iter(layers.values())).side
    return peft.OFTConfig(r=0, oft_block_size=side, use_cayley_neumann=False, target_modules=exactly(layers))


def _start_matrices(layer: Any, name: str) -> None:
    """peft's first values: nothing changes."""
    containers = [getattr(layer, part) for part in layer.adapter_layer_names if name in getattr(layer, part)]
    device = _memory(containers[0][name].device)
    for container in containers:
        container[name] = nn.Parameter(torch.empty(container[name].shape))
    layer.reset_adapter_parameters(name)
    for container in containers:
        container[name].data = container[name].data.to(device)


def _put_matrices(layer: Any, name: str, changed: Changed) -> None:
    tensors, device = changed.folded().tensors, _memory(layer.get_base_layer().weight.device)
    for part in layer.adapter_layer_names:
        if name in getattr(layer, part):
            del getattr(layer, part)[name]
        if part in tensors:
            getattr(layer, part)[name] = nn.Parameter(tensors[part].to(device), requires_grad=False)
    layer.scaling[name] = 1.0


def _start_rotation(layer: Any, name: str) -> None:
    """No rotation. peft's indices may have lost their memory with the base."""
    turned = layer.oft_R[name]
    device = _memory(turned.weight.device)
    turned.weight = nn.Parameter(torch.zeros(turned.weight.shape, device=device))
    turned.rows, turned.cols = torch.triu_indices(turned.block_size, turned.block_size, 1, device=device)


def _put_rotation(layer: Any, name: str, changed: Changed) -> None:
    layer.oft_R[name].weight.requires_grad_(False).data.copy_(changed.tensors["oft_R.weight"])


def _put_lora(layer: Any, name: str, changed: Changed) -> None:
    assert isinstance(changed, Layer)
    for part, values in (("lora_A", changed.down), ("lora_B", changed.up)):
        getattr(layer, part)[name].weight.requires_grad_(False).data.copy_(values)
    fill_magnitudes(layer, name, changed.magnitude)


def _memory(device: torch.device) -> torch.device:
    """Where weights of an adapter lie: beside the base, or on the CPU where that has no memory yet."""
    return torch.device("cpu") if device.type == "meta" else device


KINDS: dict[str, Kind] = {
    "lora": Kind(
        "LoRA", LoraModel, LoraLayer, _lora, ("lora_A", "lora_B", "lora_magnitude_vector"),
        lambda parts, scale: Layer(parts["lora_A"], parts["lora_B"], scale * len(parts["lora_A"])),
        None, _put_lora, _lora_of, rank_of="lora_A.weight",
    ),
    "lokr": Kind(
        "LoKr", KroneckerModel, LoKrLayer, _lokr,
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        lambda parts, scale: Kronecker(matrices(parts, "lokr_w1"), matrices(parts, "lokr_w2"), scale),
        _start_matrices, _put_matrices, _matrices_of(peft.LoKrConfig), rank_of="lokr_w2_b",
    ),
    "loha": Kind(
        "LoHa", HadamardModel, LoHaLayer, _loha, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        lambda parts, scale: Hadamard(
            (parts["hada_w1_a"], parts["hada_w1_b"]), (parts["hada_w2_a"], parts["hada_w2_b"]), scale
        ),
        _start_matrices, _put_matrices, _matrices_of(peft.LoHaConfig), rank_of="hada_w1_b",
    ),
    "oft": Kind(
        "OFT", RotationModel, OFTLayer, _oft, ("oft_R",), lambda parts, scale: Rotation(parts["oft_R"]),
        _start_rotation, _put_rotation, _oft_of,
    ),
}  # fmt: skip


def kind_of_layer(layer: nn.Module) -> Kind:
    """The kind of an adapted layer."""
    return next(kind for kind in KINDS.values() if isinstance(layer, kind.layer))


def kind_titled(title: str) -> Kind:
    """The kind that files of this title are of; a DoRA is a LoRA with magnitudes."""
    return next(kind for kind in KINDS.values() if kind.title == ("LoRA" if title == "DoRA" else title))


def own_tensors(layer: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Parts of an adapter in a layer: as `Kind.parts` has it, as checkpoints name its tensor, and that."""
    for part in kind_of_layer(layer).parts:
        container = getattr(layer, part)
        if name in container:
            held = container[name]
            yield (part, part, held) if isinstance(held, nn.Parameter) else (part, f"{part}.weight", held.weight)


def full_scale(layer: Any, name: str) -> float:
    """The factor before what an adapter adds at strength 1: alpha / r, alpha / sqrt(r) with rsLoRA, 1 for an OFT."""
    if isinstance(layer, OFTLayer):
        return 1.0
    rank, alphas = layer.r[name], layer.lora_alpha if isinstance(layer, LoraLayer) else layer.alpha
    stabilised = isinstance(layer, LoraLayer) and layer.use_rslora[name]
    return float(alphas[name] / (math.sqrt(rank) if stabilised else rank))
