"""Low-rank adapters inside a transformer, or the whole transformer unfrozen.

The base weights are never changed while training. Initialisations that take their starting point out of the base
(PiSSA, OLoRA) get a second, frozen adapter that subtracts it again: W + s BA - s B0 A0. What is trained is then an
ordinary LoRA of rank 2r against the untouched base, and a base kept in bfloat16 is not rounded twice.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import peft
import torch
from diffusers.utils import recurse_remove_peft_layers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError, LoraConfig
from qwen_image_finetune.lora import variants
from qwen_image_finetune.lora.layers import Layer
from qwen_image_finetune.lora.names import USUAL_TARGETS, exactly
from qwen_image_finetune.lora.targets import endings, lora_layers, target_modules

INITIAL = "_initial"  # ending of the name of the frozen adapter that subtracts a starting point
MAGNITUDE = "lora_magnitude_vector.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def add_adapter(transformer: nn.Module, config: LoraConfig, seed: int, ranks: Mapping[str, int] | None = None) -> None:
    """Freeze `transformer` and add a trainable adapter with float32 weights.

    The initial weights are a function of `seed` and the base; the global random state is not moved. Where
    config.pretrained_weight names a LoRA to start from, config.init_lora_weights does not count.

    Args:
        ranks: of modules, by name, that have another rank than config.r, as in the LoRA that it starts from.

    Raises:
        ConfigError: the initialisation or the targets cannot be used with this transformer.
    """
    name = config.adapter_name
    initialisation = config.initialisation
    if initialisation == "orthogonal" and config.r % 2:
        raise ConfigError(f"model.lora.init_lora_weights='orthogonal' needs an even rank, not model.lora.r={config.r}")
    modules = target_modules(transformer, config.target_modules, config.exclude_modules)
    _check_patterns(config, modules)
    if name in adapter_names(transformer):
        raise ConfigError(f"model.lora.adapter_name={name!r}: the transformer already has an adapter of that name")
    transformer.requires_grad_(False)
    devices = {parameter.device for parameter in transformer.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        _inject(transformer, config, name, ranks or {})
        # After peft's own draws; generator by generator, because torch.manual_seed would also move other devices'.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        starts = {module: _initialise(layer, name, initialisation) for module, layer in lora_layers(transformer, name)}
        if any(start is not None for start in starts.values()):
            _inject(transformer, config.model_copy(update={"lora_dropout": 0.0}), name + INITIAL, ranks or {})
    assert starts.keys() == set(modules)
    variants.install(transformer, name, config.use_dora, config.rank_dropout, config.module_dropout)
    for module, layer in lora_layers(transformer, name + INITIAL):
        start = starts[module]
        assert start is not None
        _fill(layer, name + INITIAL, start[0], -start[1])
    active = [name] + [name + INITIAL] * (name + INITIAL in adapter_names(transformer))
    activate(transformer, active)
    for each in active:
        for _, layer in lora_layers(transformer, each):
            for factor in factors(layer, each):
                factor.requires_grad_(each == name)


def make_everything_trainable(transformer: nn.Module) -> None:
    """Full fine-tuning: every weight in float32 and trainable.

    Raises:
        ConfigError: a weight is quantised.
    """
    for name, parameter in transformer.named_parameters():
        if parameter.dtype not in FLOATS:
            raise ConfigError(
                f"model.lora=null: {name} is {parameter.dtype}; a quantised base is frozen and cannot be fully "
                "fine-tuned; set model.quantize=false or give model.lora"
            )
        parameter.data = parameter.data.float()
    transformer.requires_grad_(True)


def trainable_state(transformer: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Everything of the adapter that a resume needs, under peft's keys; tensors share memory with the model.

    A frozen starting point is included (`MODULE.lora_A.initial.weight`): it is not computed anew on another machine.
    """
    state: dict[str, Tensor] = {}
    for key, weight in _weights(transformer, adapter_name):
        state[key] = weight.detach()
    if not state:
        raise ValueError(f"the transformer has no adapter {adapter_name!r}")
    return state


def adapter_layers(
    transformer: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None = None
) -> dict[str, Layer]:
    """The adapter as a LoRA against the untouched base, by module name; a starting point is subtracted in rank 2r.

    Args:
        state: values of `trainable_state` to take instead of the transformer's own.
    """
    state = trainable_state(transformer, adapter_name) if state is None else state
    layers: dict[str, Layer] = {}
    for module, layer in lora_layers(transformer, adapter_name):
        parts = ["weight", "initial.weight"] if f"{module}.lora_A.initial.weight" in state else ["weight"]
        down = torch.cat([state[f"{module}.lora_A.{part}"].float() for part in parts])
        up = torch.cat([state[f"{module}.lora_B.{part}"].float() for part in parts], dim=1)
        found = Layer(down, up, full_scale(layer, adapter_name) * down.shape[0])
        magnitude = state.get(f"{module}.{MAGNITUDE}")
        layers[module] = found if magnitude is None else variants.with_magnitude(found, magnitude.float(), layer)
    return layers


def full_scale(layer: LoraLayer, adapter_name: str) -> float:
    """The factor before B A at strength 1: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
    rank = layer.r[adapter_name]
    divisor = math.sqrt(rank) if layer.use_rslora[adapter_name] else rank
    return float(layer.lora_alpha[adapter_name] / divisor)


def set_strength(transformer: nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Scale the effect of every adapter, or of one: 0 is the base, 1 what was trained. Not cumulative.

    Raises:
        ValueError: there is no adapter.
    """
    for layer in _all_layers(transformer):
        for name in layer.lora_A:
            if adapter_name not in (None, name):
                continue
            if (variant := variants.variant_of(layer, name)) is not None:
                variant.strength = strength
            else:
                layer.set_scale(name, strength)


def second_factors(transformer: nn.Module, adapter_name: str) -> list[Tensor]:
    """B of every layer, which starts at zero."""
    return [factors(layer, adapter_name)[1].weight for _, layer in lora_layers(transformer, adapter_name)]


@torch.no_grad()
def limit_norms(transformer: nn.Module, limit: float, adapter_name: str | None = None) -> None:
    """Scale s B A down to a Frobenius norm of `limit` wherever it is more, both factors alike: `scale_weight_norms` of
    kohya's tools. The norm comes from products as small as the rank, |B A|^2 = sum (B^T B) * (A A^T)."""
    for _, layer in lora_layers(transformer, adapter_name):
        for name in layer.lora_A:
            down, up = (factor.weight for factor in factors(layer, name))
            if not down.requires_grad:
                continue
            norm = full_scale(layer, name) * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
            ratio = (limit / norm).clamp(max=1.0).sqrt()  # of zero: infinity, so 1
            for factor in (down, up):
                factor.mul_(ratio)


def merge_lora(transformer: nn.Module, strength: float = 1.0) -> None:
    """Add the active adapters to the weights, summed in float32, and take them off.

    Raises:
        ValueError: there is no adapter, or a weight is quantised: small changes would be rounded away.
    """
    with torch.no_grad():
        names = [name for name in adapter_names(transformer) if not name.endswith(INITIAL)]
        changes = {name: adapter_layers(transformer, name) for name in names}
        for module, layer in lora_layers(transformer):
            weight = base_layer(layer).weight
            if weight.dtype not in FLOATS:
                raise ValueError(
                    f"cannot merge a LoRA into {weight.dtype} weights without rounding it away; load the base with "
                    "model.quantize=false"
                )
            original = weight.float()
            merged = original.clone()
            for name in layer.active_adapters:
                if module in changes.get(name, ()):
                    merged += strength * changes[name][module].change(original)
            weight.copy_(merged)
    remove(transformer)


def adapter_names(transformer: nn.Module) -> tuple[str, ...]:
    """Names of the adapters in the transformer."""
    return tuple(dict.fromkeys(name for _, layer in lora_layers(transformer) for name in layer.lora_A))


def factors(layer: LoraLayer, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
    """The two factors (lora_A, lora_B) of one adapter in a layer."""
    return cast(nn.Linear, layer.lora_A[adapter_name]), cast(nn.Linear, layer.lora_B[adapter_name])


def base_layer(layer: LoraLayer) -> nn.Linear:
    """The frozen layer under an adapter."""
    return cast(nn.Linear, layer.get_base_layer())


def _needs_base(initialisation: str) -> bool:
    return initialisation.startswith(("pissa", "olora"))


def _inject(transformer: nn.Module, config: LoraConfig, name: str, ranks: Mapping[str, int]) -> None:
    adapter = peft.LoraConfig(
        r=config.r,
        lora_alpha=cast(int, config.lora_alpha),  # annotated so, divided as a float
        lora_dropout=config.lora_dropout,
        target_modules=_targets(transformer, config),
        rank_pattern={**{f"^{re.escape(module)}": rank for module, rank in ranks.items()}, **config.rank_pattern},
        alpha_pattern=cast(dict[str, int], config.alpha_pattern),
        use_rslora=config.use_rslora,
    )
    inject(transformer, adapter, name)


def _check_patterns(config: LoraConfig, modules: Sequence[str]) -> None:
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules):  # as peft looks names up
                raise ConfigError(
                    f"model.lora.{key}: {pattern!r} matches no target; they end in {', '.join(endings(modules))}"
                )


def _targets(transformer: nn.Module, config: LoraConfig) -> list[str] | str:
    """As peft takes them; with some left out, the names of the others."""
    if config.exclude_modules is None:
        return config.target_modules or list(USUAL_TARGETS)
    return exactly(target_modules(transformer, config.target_modules, config.exclude_modules))


def inject(transformer: nn.Module, adapter: peft.LoraConfig, name: str) -> None:
    """Add float32 adapter layers, with peft's own first values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        peft.inject_adapter_in_model(adapter, transformer, name)  # as diffusers does, where it has a mixin
        cast(Any, transformer)._hf_peft_config_loaded = True
    for _, layer in lora_layers(transformer, name):
        for factor in factors(layer, name):
            factor.float()


def activate(transformer: nn.Module, names: Sequence[str]) -> None:
    """Let these adapters work, all at once, and no others."""
    for _, layer in lora_layers(transformer):
        layer.set_adapter(list(names))


def remove(transformer: nn.Module) -> None:
    """Take all adapters off; the base is what it was."""
    recurse_remove_peft_layers(transformer)
    del cast(Any, transformer).peft_config
    cast(Any, transformer)._hf_peft_config_loaded = False


def _initialise(layer: LoraLayer, name: str, initialisation: bool | str) -> tuple[Tensor, Tensor] | None:
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


def _initialise_from_base(layer: LoraLayer, name: str, initialisation: str) -> tuple[Tensor, Tensor]:
    base = base_layer(layer)
    shape, dtype, rank = tuple(base.weight.shape), base.weight.dtype, layer.r[name]
    key = f"model.lora.init_lora_weights={initialisation!r}"
    if dtype not in FLOATS:
        raise ConfigError(
            f'{key} decomposes the base, which is quantised ({dtype}); use true or "gaussian", or '
            "set model.quantize=false"
        )
    if rank > min(shape):
        raise ConfigError(
            f"{key}: model.lora.r={rank} is more than a layer of {shape} has directions; use at most {min(shape)}, "
            "or other target_modules"
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


def _fill(layer: LoraLayer, name: str, down: Tensor, up: Tensor) -> None:
    with torch.no_grad():
        for factor, value in zip(factors(layer, name), (down, up), strict=True):
            factor.weight.copy_(value)


def _weights(transformer: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    for module, layer in lora_layers(transformer, adapter_name):
        for name, ending in ((adapter_name, "weight"), (adapter_name + INITIAL, "initial.weight")):
            if name in layer.lora_A:
                down, up = factors(layer, name)
                yield f"{module}.lora_A.{ending}", down.weight
                yield f"{module}.lora_B.{ending}", up.weight
        if adapter_name in layer.lora_magnitude_vector:
            yield f"{module}.{MAGNITUDE}", cast(nn.Linear, layer.lora_magnitude_vector[adapter_name]).weight


def _all_layers(transformer: nn.Module) -> list[LoraLayer]:
    layers = [layer for _, layer in lora_layers(transformer)]
    if not layers:
        raise ValueError("the transformer has no LoRA: load one first")
    return layers
