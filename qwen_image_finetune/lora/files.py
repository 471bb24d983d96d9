"""LoRA files and the adapter in a transformer: saved so that it means the same everywhere, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError, LoraConfig
from qwen_image_finetune.disk.files import Staged, staged_file
from qwen_image_finetune.lora import adapters, variants
from qwen_image_finetune.lora.dialects import write_state
from qwen_image_finetune.lora.kinds import KINDS, full_scale, kind_titled, own_tensors
from qwen_image_finetune.lora.layers import Changed, Layer, kind_of
from qwen_image_finetune.lora.metadata import (
    adapter_metadata,
    model_metadata,
    network_metadata,
)
from qwen_image_finetune.lora.names import Naming
from qwen_image_finetune.lora.other_layers import Rotation
from qwen_image_finetune.lora.reading import read_fitting
from qwen_image_finetune.lora.sources import find_lora
from qwen_image_finetune.lora.starts import INITIAL
from qwen_image_finetune.lora.targets import adapted_layers, endings, target_modules
from qwen_image_finetune.machine import console


def save_lora(
    path: Path,
    transformer: nn.Module,
    config: LoraConfig,
    metadata: Mapping[str, str],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter as a float32 file in diffusers' dialect.

    The scale lora_alpha / r is inside the factors, and alpha the rank: diffusers reads alpha in the metadata, ComfyUI
    and kohya's tools do not, so that another one would mean another strength there.

    Args:
        metadata: joins what the file says about itself (ss_*, modelspec.*, qif.*) and wins over it; `run_metadata`
            has that of a run.
        state: values of `adapters.trainable_state` to write instead of the transformer's own.

    Raises:
        ValueError: the transformer has no such adapter, or a metadata value is not a string.
    """
    trained = adapters.adapter_layers(transformer, config.adapter_name, state)
    layers = {name: layer.folded() for name, layer in trained.items()}
    targets = cast(Any, transformer).peft_config[config.adapter_name].target_modules
    about = {
        **adapter_metadata(layers, targets),
        **network_metadata(layers),
        **model_metadata(transformer, config),
    }
    with staged_file(path) as partial:
        write(partial, write_state(layers, {}, "diffusers"), {**about, **metadata})


def load_lora(
    transformer: nn.Module,
    source: str | Path,
    naming: Naming,
    config: LoraConfig | None = None,
    adapter_name: str = "default",
) -> None:
    """Load a LoRA from a file, a folder or the hub; its effect is exactly what its file says.

    With `config` (training goes on from it) the adapter is the config's: rank and target modules must agree, and where
    the file has another alpha / r, the ratio goes into lora_B. Without, it is built as the file has it, and frozen.
    What had to be assumed about the file is said.

    Raises:
        LoraFileError: the file is broken or does not fit this transformer.
        ConfigError: its rank or target modules are not the config's.
    """
    path = find_lora(source)
    file = read_fitting(transformer, path, naming)
    layers = file.layers
    for note in file.notes:
        console.note(note)
    if config is None:
        _add_as_it_is(transformer, layers, adapter_name)
        return
    adapter_name = config.adapter_name
    _check_config(transformer, layers, path, config)
    if adapter_name not in adapters.adapter_names(transformer):
        started = config.model_copy(update={"pretrained_weight": str(path)})
        adapters.add_adapter(transformer, started, seed=0, ranks=_other_ranks(layers, config))
    _fill(transformer, layers, adapter_name)


def check_lora(transformer: nn.Module, source: str | Path, naming: Naming, config: LoraConfig) -> dict[str, int]:
    """Refuse what `load_lora` would with this config; of the transformer, shapes are enough.

    Returns:
        The ranks of modules that are not config.r: what the adapter must have, for `adapters.add_adapter`.

    Raises:
        LoraFileError, ConfigError: as there.
    """
    path = find_lora(source)
    layers = read_fitting(transformer, path, naming).layers
    _check_config(transformer, layers, path, config)
    return _other_ranks(layers, config)


def write(path: Staged, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of a LoRA file with what it says about itself.

    Raises:
        ValueError: a metadata value is not a string.
    """
    wrong = sorted(key for key, value in metadata.items() if not isinstance(value, str))
    if wrong:
        raise ValueError(f"metadata of a safetensors file are strings; these are not: {', '.join(wrong)}")
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}
    save_file(tensors, path, metadata={**metadata, "format": "pt"})


def _check_config(transformer: nn.Module, layers: Mapping[str, Changed], path: Path, config: LoraConfig) -> None:
    wanted = target_modules(transformer, config.target_modules, config.exclude_modules)
    ranks = sorted({layer.rank for layer in layers.values()})
    only_file, only_config = [n for n in layers if n not in wanted], [n for n in wanted if n not in layers]
    kind, asked = kind_of(layers), KINDS[config.type].title
    if kind_titled(kind) is not KINDS[config.type]:
        raise ConfigError(
            f"model.lora.pretrained_weight: {path} is a {kind}, and model.lora.type={config.type} asks for a {asked}"
        )
    if isinstance(found := next(iter(layers.values())), Rotation) and found.side != config.oft_block_size:
        raise ConfigError(
            f"model.lora.pretrained_weight: {path} has blocks of {found.side}, and model.lora.oft_block_size is "
            f"{config.oft_block_size}"
        )
    if kind == "DoRA" and not config.use_dora:
        raise ConfigError(
            f"model.lora.pretrained_weight: {path} is a DoRA, and model.lora.use_dora=false would leave its "
            "magnitudes: set model.lora.use_dora to true"
        )
    if (
        (config.r in ranks or not KINDS[config.type].rank_counts(layers)) and not only_file and not only_config
    ):  # where others are in it too, modules differ in rank
        return
    differences = [f"{len(names)} modules only in the {where}, such as {names[0]}"
                   for where, names in (("file", only_file), ("config", only_config)) if names]  # fmt: skip
    raise ConfigError(
        f"model.lora.pretrained_weight: {path} does not match model.lora. "
        f"The file has rank {', '.join(map(str, ranks))} and targets {endings(layers)}; "
        f"the config has r={config.r} and target_modules={config.target_modules!r}"
        + "".join(f"; {difference}" for difference in differences)
        + f". Set model.lora.r to {'the file' if len(ranks) == 1 else 'one of the file'}'s"
        " and model.lora.target_modules to what it has"
    )


def _other_ranks(layers: Mapping[str, Changed], config: LoraConfig) -> dict[str, int]:
    if not KINDS[config.type].rank_counts(layers):
        return {}
    return {name: layer.rank for name, layer in layers.items() if config.rank_pattern or layer.rank != config.r}


def _add_as_it_is(transformer: nn.Module, layers: Mapping[str, Changed], name: str) -> None:
    if name in adapters.adapter_names(transformer):
        raise ValueError(f"the transformer already has an adapter {name!r}; give the second LoRA another name")
    kind = kind_titled(kind_of(layers))
    with torch.random.fork_rng(devices=[]):
        adapters.inject(transformer, kind, kind.config_of(layers), name)
    variants.install(transformer, name, dora=kind_of(layers) == "DoRA")
    for module, layer in adapted_layers(transformer, name):
        kind.put(layer, name, layers[module])


@torch.no_grad()
def _fill(transformer: nn.Module, layers: Mapping[str, Changed], name: str) -> None:
    for module, layer in adapted_layers(transformer, name):
        changed = layers[module].at_scale(full_scale(layer, name))
        own = {key: tensor for _, key, tensor in own_tensors(layer, name) if not key.startswith(adapters.MAGNITUDE)}
        given = {key: tensor for key, tensor in changed.tensors.items() if key in own}
        shapes = [{key: tuple(tensor.shape) for key, tensor in each.items()} for each in (given, own)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"model.lora.pretrained_weight: {module} is {shapes[0]} in the file, and {shapes[1]} with this "
                "model.lora: set r, decompose_factor and rank_pattern to the file's"
            )
        for key, tensor in given.items():
            own[key].copy_(tensor)
        for part, _, tensor in own_tensors(layer, name + INITIAL):
            if part == "lora_B":  # the file is a LoRA of the untouched base: nothing to subtract
                tensor.zero_()
        if isinstance(changed, Layer):
            variants.fill_magnitudes(layer, name, changed.magnitude)
