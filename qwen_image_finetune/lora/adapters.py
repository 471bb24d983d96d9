"""Adapters inside a transformer, or the whole transformer unfrozen.

The base weights are never changed while training. Initialisations that take their starting point out of the base
(PiSSA, OLoRA) get a second, frozen adapter that subtracts it again: W + s BA - s B0 A0. What is trained is then an
ordinary LoRA of rank 2r against the untouched base, and a base kept in bfloat16 is not rounded twice.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import peft
import torch
from diffusers.utils import recurse_remove_peft_layers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen_image_finetune.config import ConfigError, LoraConfig
from qwen_image_finetune.lora import variants
from qwen_image_finetune.lora.kinds import KINDS, Kind, full_scale, kind_of_layer, own_tensors
from qwen_image_finetune.lora.layers import Changed, Layer
from qwen_image_finetune.lora.names import USUAL_TARGETS, exactly
from qwen_image_finetune.lora.starts import FLOATS, INITIAL, check_rank, factors, fill, initialise
from qwen_image_finetune.lora.targets import adapted_layers, endings, linear_modules, lora_layers, target_modules

MAGNITUDE = "lora_magnitude_vector"


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
    modules = check_adapter(transformer, config)
    kind = KINDS[config.type]
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
        starts: dict[str, tuple[Tensor, Tensor] | None] = {}
        for module, layer in adapted_layers(transformer, name):
            starts[module] = initialise(layer, name, initialisation) if kind.start is None else None
            if kind.start is not None:
                kind.start(layer, name)
                layer.dropouts[name] = (config.rank_dropout, config.module_dropout)
        if any(start is not None for start in starts.values()):
            _inject(transformer, config.model_copy(update={"lora_dropout": 0.0}), name + INITIAL, ranks or {})
    assert starts.keys() == set(modules)
    if kind is KINDS["lora"]:
        variants.install(transformer, name, config.use_dora, config.rank_dropout, config.module_dropout)
    for module, layer in lora_layers(transformer, name + INITIAL):
        start = starts[module]
        assert start is not None
        fill(layer, name + INITIAL, start[0], -start[1])
    active = [name] + [name + INITIAL] * (name + INITIAL in adapter_names(transformer))
    activate(transformer, active)
    for each in active:
        for _, layer in adapted_layers(transformer, each):
            for _, _, tensor in own_tensors(layer, each):
                tensor.requires_grad_(each == name)


def check_adapter(transformer: nn.Module, config: LoraConfig) -> list[str]:
    """The modules that an adapter sits on, by name; of the transformer the shapes are enough.

    Raises:
        ConfigError: targets, patterns, the rank or the size of blocks do not fit it.
    """
    if config.initialisation == "orthogonal" and config.r % 2:
        raise ConfigError(f"model.lora.init_lora_weights='orthogonal' needs an even rank, not model.lora.r={config.r}")
    modules = target_modules(transformer, config.target_modules, config.exclude_modules)
    _check_patterns(config, modules)
    linear = linear_modules(transformer)
    for module in modules if config.pretrained_weight is None and config.type == "lora" else ():
        found = (rank for pattern, rank in config.rank_pattern.items() if _means(pattern, module))
        layer = cast(nn.Linear, linear[module])
        check_rank(config.initialisation, next(found, config.r), (layer.out_features, layer.in_features))
    if config.type == "oft":
        _check_blocks(transformer, config, modules)
    return modules


def make_everything_trainable(transformer: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Full fine-tuning: every weight trainable, in float32 or in another precision.

    Raises:
        ConfigError: a weight is quantised.
    """
    for name, parameter in transformer.named_parameters():
        if parameter.dtype not in FLOATS:
            raise ConfigError(
                f"model.lora=null: {name} is {parameter.dtype}; a quantised base is frozen and cannot be fully "
                "fine-tuned; set model.quantize=false or give model.lora"
            )
        parameter.data = parameter.data.to(dtype)
    transformer.requires_grad_(True)


def trainable_state(transformer: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Everything of the adapter that a resume needs, under peft's keys; tensors share memory with the model.

    A frozen starting point is included (`MODULE.lora_A.initial.weight`): it is not computed anew on another machine.
    """
    state: dict[str, Tensor] = {}
    for module, layer in adapted_layers(transformer, adapter_name):
        for _, key, tensor in own_tensors(layer, adapter_name):
            state[f"{module}.{key}"] = tensor.detach()
        for part, _, tensor in own_tensors(layer, adapter_name + INITIAL):
            state[f"{module}.{part}.initial.weight"] = tensor.detach()
    if not state:
        raise ValueError(f"the transformer has no adapter {adapter_name!r}")
    return state


def adapter_layers(
    transformer: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None = None
) -> dict[str, Changed]:
    """What the adapter does to the untouched base, by module name; a starting point is subtracted in rank 2r.

    Args:
        state: values of `trainable_state` to take instead of the transformer's own.
    """
    state = trainable_state(transformer, adapter_name) if state is None else state
    layers: dict[str, Changed] = {}
    for module, layer in adapted_layers(transformer, adapter_name):
        parts = {part: state[f"{module}.{key}"].float() for part, key, _ in own_tensors(layer, adapter_name)}
        for part, axis in (("lora_A", 0), ("lora_B", 1)):
            if (initial := state.get(f"{module}.{part}.initial.weight")) is not None:
                parts[part] = torch.cat([parts[part], initial.float()], dim=axis)
        found = kind_of_layer(layer).changed(parts, full_scale(layer, adapter_name))
        if isinstance(found, Layer) and MAGNITUDE in parts:
            found = variants.with_magnitude(found, parts[MAGNITUDE], layer)
        layers[module] = found
    return layers


def set_strength(transformer: nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Scale the effect of every adapter, or of one: 0 is the base, 1 what was trained. Not cumulative.

    Raises:
        ValueError: there is no adapter.
    """
    for layer in _all_layers(transformer):
        for name in layer.r:
            if adapter_name not in (None, name):
                continue
            if (variant := variants.variant_of(layer, name)) is not None:
                variant.strength = strength
            else:
                layer.set_scale(name, strength)


@contextmanager
def at_rest(transformer: nn.Module, strength: float | None) -> Iterator[None]:
    """The transformer as prediction has it: no dropout, no gradients, adapters at `strength`; None: there are none."""
    was_training = transformer.training
    transformer.eval()
    if strength is not None:
        set_strength(transformer, strength)
    try:
        with torch.no_grad():
            yield
    finally:
        if strength is not None:
            set_strength(transformer, 1.0)
        transformer.train(was_training)


def second_factors(transformer: nn.Module, adapter_name: str) -> list[Tensor]:
    """B of every layer of a LoRA, which starts at zero."""
    return [factors(layer, adapter_name)[1].weight for _, layer in lora_layers(transformer, adapter_name)]


@torch.no_grad()
def limit_norms(transformer: nn.Module, limit: float) -> None:
    """Scale every trained change down to a Frobenius norm of `limit` where it is more, all its factors alike, as
    `scale_weight_norms` of kohya's tools and LyCORIS do; a DoRA's before rows get their lengths."""
    for _, layer in adapted_layers(transformer):
        for name in layer.r:
            parts = {part: tensor for part, _, tensor in own_tensors(layer, name) if part != MAGNITUDE}
            if not all(tensor.requires_grad for tensor in parts.values()):
                continue
            # Of factors that are cut over processes, each puts the whole ones together and scales its own part.
            whole = {part: one.full_tensor() if isinstance(one, DTensor) else one for part, one in parts.items()}
            norm = kind_of_layer(layer).changed(whole, full_scale(layer, name)).norm()
            assert norm is not None, "model.lora.max_norm is refused for rotations"
            ratio = (limit / norm).clamp(max=1.0) ** (1 / len(parts))  # of zero: infinity, so 1
            for tensor in parts.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).mul_(ratio)


def adapter_names(transformer: nn.Module) -> tuple[str, ...]:
    """Names of the adapters in the transformer."""
    return tuple(dict.fromkeys(name for _, layer in adapted_layers(transformer) for name in layer.r))


def _inject(transformer: nn.Module, config: LoraConfig, name: str, ranks: Mapping[str, int]) -> None:
    kind = KINDS[config.type]
    adapter = kind.config(
        config,
        r=config.r,
        alpha=config.lora_alpha,
        target_modules=_targets(transformer, config),
        rank_pattern={**{f"^{re.escape(module)}": rank for module, rank in ranks.items()}, **config.rank_pattern},
        alpha_pattern=config.alpha_pattern,
    )
    inject(transformer, kind, adapter, name)


def _check_patterns(config: LoraConfig, modules: Sequence[str]) -> None:
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(_means(pattern, module) for module in modules):
                raise ConfigError(
                    f"model.lora.{key}: {pattern!r} matches no target; they end in {', '.join(endings(modules))}"
                )


def _means(pattern: str, module: str) -> bool:
    """Whether a pattern is about a module, as peft looks names up."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _targets(transformer: nn.Module, config: LoraConfig) -> list[str] | str:
    """As peft takes them; with some left out, the names of the others."""
    if config.exclude_modules is None:
        return config.target_modules or list(USUAL_TARGETS)
    return exactly(target_modules(transformer, config.target_modules, config.exclude_modules))


def _check_blocks(transformer: nn.Module, config: LoraConfig, modules: Sequence[str]) -> None:
    """peft would take other blocks where these do not fit."""
    linear, side = linear_modules(transformer), config.oft_block_size
    for module in modules:
        inputs = cast(nn.Linear, linear[module]).in_features
        if inputs % side:
            raise ConfigError(
                f"model.lora.oft_block_size={side} does not divide the {inputs} inputs of {module}: take a number that "
                "divides those of all targets, or leave it out (model.lora.exclude_modules)"
            )


def inject(transformer: nn.Module, kind: Kind, adapter: peft.PeftConfig, name: str) -> None:
    """Add float32 adapter layers, with peft's own first values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        kind.tuner(transformer, adapter, name)  # as `peft.inject_adapter_in_model` does
        cast(Any, transformer)._hf_peft_config_loaded = True
    for _, layer in adapted_layers(transformer, name):
        for _, _, tensor in own_tensors(layer, name):
            tensor.data = tensor.data.float()


def activate(transformer: nn.Module, names: Sequence[str]) -> None:
    """Let these adapters work, all at once, and no others."""
    for _, layer in adapted_layers(transformer):
        layer.set_adapter(list(names))


def remove(transformer: nn.Module) -> None:
    """Take all adapters off; the base is what it was."""
    recurse_remove_peft_layers(transformer)
    del cast(Any, transformer).peft_config
    cast(Any, transformer)._hf_peft_config_loaded = False


def _all_layers(transformer: nn.Module) -> list[Any]:
    layers = [layer for _, layer in adapted_layers(transformer)]
    if not layers:
        raise ValueError("the transformer has no LoRA: load one first")
    return layers
