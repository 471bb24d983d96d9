"""LoRA files: saved as diffusers reads them, read in every dialect, exported with a proof.

Only safetensors is read. Every key of a file finds its place in the transformer or the file is refused: a key that is
skipped gives another picture without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError, LoraConfig
from qwen_image_finetune.config.registry import family_of_pipeline
from qwen_image_finetune.disk.files import Staged, staged_file
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.adapters import INITIAL, Layer
from qwen_image_finetune.lora.dialects import read_state, unmatched_message, write_state
from qwen_image_finetune.lora.header import ADAPTER_METADATA, LoraFileError, adapter_metadata, read_metadata
from qwen_image_finetune.lora.metadata import (
    adapter_json,
    exactly,
    model_metadata,
    network_metadata,
    peft_fields,
)
from qwen_image_finetune.lora.names import Naming
from qwen_image_finetune.lora.sources import find_lora
from qwen_image_finetune.lora.targets import endings, linear_modules, lora_layers, target_modules

Dialect = Literal["diffusers", "comfy", "kohya"]


def save_lora(
    path: Path,
    transformer: nn.Module,
    config: LoraConfig,
    metadata: Mapping[str, str],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter as a float32 LoRA file in diffusers' dialect.

    Args:
        metadata: joins what the file says about itself (ss_*, modelspec.*, qif.*) and wins over it; `run_metadata`
            has that of a run.
        state: values of `adapters.trainable_state` to write instead of the transformer's own.

    Raises:
        ValueError: the transformer has no such adapter, or a metadata value is not a string.
    """
    layers = adapters.adapter_layers(transformer, config.adapter_name, state)
    peft_config: peft.LoraConfig = cast(Any, transformer).peft_config[config.adapter_name]
    about = {
        ADAPTER_METADATA: adapter_json(layers, peft_config.target_modules),
        **network_metadata(layers),
        **model_metadata(transformer, config),
    }
    with staged_file(path) as partial:
        _write(partial, write_state(layers, {}, "diffusers"), {**about, **metadata})


def read_lora(path: Path, naming: Naming, modules: Iterable[str] = ()) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers, by diffusers module name, and metadata of a LoRA file in any dialect.

    Args:
        naming: of the model that the file is for (`Family.naming`).
        modules: names that flattened keys (`lora_unet_...`) may mean; without them diffusers' own conversion is asked.

    Raises:
        LoraFileError: the file is broken, of another kind, or a key is left over.
    """
    metadata = read_metadata(path)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise LoraFileError(f"{path} cannot be read: {error}; download or save it again") from error
    names = naming.native
    foreign = any(".processor." in key for key in state)  # the dialect of x-labs
    if foreign or (not modules and not names and any(key.startswith("lora_unet_") for key in state)):
        state = naming.pipeline.lora_state_dict(dict(state))
    layers = read_state(state, names, adapter_metadata(metadata, path), modules, path)
    if not layers:
        raise LoraFileError(f"{path} holds no LoRA layers")
    return layers, metadata


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

    Raises:
        LoraFileError: the file is broken or does not fit this transformer.
        ConfigError: its rank or target modules are not the config's.
    """
    path = find_lora(source)
    layers = fitting_layers(transformer, path, naming)
    if config is None:
        _add_as_it_is(transformer, layers, adapter_name)
        return
    adapter_name = config.adapter_name
    _check_config(transformer, layers, path, config)
    if adapter_name not in adapters.adapter_names(transformer):
        adapters.add_adapter(transformer, config.model_copy(update={"pretrained_weight": str(path)}), seed=0)
    _fill(transformer, layers, adapter_name)


def check_lora(transformer: nn.Module, source: str | Path, naming: Naming, config: LoraConfig) -> None:
    """Refuse what `load_lora` would with this config; of the transformer, shapes are enough.

    Raises:
        LoraFileError, ConfigError: as there.
    """
    path = find_lora(source)
    _check_config(transformer, fitting_layers(transformer, path, naming), path, config)


def fitting_layers(transformer: nn.Module, path: Path, naming: Naming) -> dict[str, Layer]:
    """The layers of a LoRA file, by module name, for a transformer whose weights are not read.

    Raises:
        LoraFileError: the file is broken or does not fit this transformer.
    """
    linear = linear_modules(transformer)
    layers, _ = read_lora(path, naming, linear)
    unknown = [name for name in layers if name not in linear]
    if unknown:
        raise LoraFileError(unmatched_message(path, unknown, len(layers)))
    for name, layer in layers.items():
        weight_shape = (cast(Any, linear[name]).out_features, cast(Any, linear[name]).in_features)
        if weight_shape != (layer.up.shape[0], layer.down.shape[1]):
            raise LoraFileError(
                f"{path}: {name} is {weight_shape[0]} x {weight_shape[1]} in this transformer and "
                f"{layer.up.shape[0]} x {layer.down.shape[1]} in the file: it was trained on another model"
            )
    return layers


def export_lora(source: Path, destination: Path, dialect: Dialect, naming: Naming, overwrite: bool = False) -> None:
    """Write a LoRA file again in another dialect; what is written is read back and must change the weights alike.

    Metadata is kept, except diffusers' own entry in other dialects: diffusers would apply its alpha a second time.

    Raises:
        OutputError: the destination is there already, without `overwrite`, or belongs to a run.
        LoraFileError: the source cannot be used, is of another family, or the exported file does not say the same.
    """
    if destination.suffix != ".safetensors":
        raise LoraFileError(f"{destination}: a LoRA is exported to a file that ends in .safetensors")
    path = find_lora(source)
    check_output(destination, overwrite)
    layers, metadata = read_lora(path, naming)
    family, asked = metadata.get("qif.family"), family_of_pipeline(naming.pipeline.__name__)
    if family not in (None, asked):  # modules may be called alike, and would get the other model's names unnoticed
        raise LoraFileError(f"{path} is a LoRA of {family}, not of {asked}: export it with --family {family}")
    about = {key: value for key, value in metadata.items() if key != ADAPTER_METADATA} | network_metadata(layers)
    if dialect == "diffusers":
        about[ADAPTER_METADATA] = adapter_json(layers, exactly(layers))
    with staged_file(destination) as partial:
        _write(partial, write_state(layers, naming.native, dialect), about)
        again, _ = read_lora(partial, naming, modules=list(layers))
        _check_same(layers, again, destination)


def _write(path: Staged, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    wrong = sorted(key for key, value in metadata.items() if not isinstance(value, str))
    if wrong:
        raise ValueError(f"metadata of a safetensors file are strings; these are not: {', '.join(wrong)}")
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state.items()}
    save_file(tensors, path, metadata={**metadata, "format": "pt"})


def _check_config(transformer: nn.Module, layers: Mapping[str, Layer], path: Path, config: LoraConfig) -> None:
    wanted = target_modules(transformer, config.target_modules)
    ranks = sorted({layer.rank for layer in layers.values()})
    only_file, only_config = [n for n in layers if n not in wanted], [n for n in wanted if n not in layers]
    if ranks == [config.r] and not only_file and not only_config:
        return
    differences = [f"{len(names)} modules only in the {where}, such as {names[0]}"
                   for where, names in (("file", only_file), ("config", only_config)) if names]  # fmt: skip
    raise ConfigError(
        f"model.lora.pretrained_weight: {path} does not match model.lora. "
        f"The file has rank {', '.join(map(str, ranks))} and targets {endings(layers)}; "
        f"the config has r={config.r} and target_modules={config.target_modules!r}"
        + "".join(f"; {difference}" for difference in differences)
        + ". Set model.lora.r and model.lora.target_modules to the file's"
    )


def _add_as_it_is(transformer: nn.Module, layers: Mapping[str, Layer], name: str) -> None:
    if name in adapters.adapter_names(transformer):
        raise ValueError(f"the transformer already has an adapter {name!r}; give the second LoRA another name")
    described = peft_fields(layers, exactly(layers))
    with torch.random.fork_rng(devices=[]):
        adapters.inject(transformer, peft.LoraConfig(**described), name)
    for module, layer in lora_layers(transformer, name):
        for factor, value in zip(adapters.factors(layer, name), (layers[module].down, layers[module].up), strict=True):
            factor.requires_grad_(False)
            factor.weight.data.copy_(value)


def _fill(transformer: nn.Module, layers: Mapping[str, Layer], name: str) -> None:
    with torch.no_grad():
        for module, layer in lora_layers(transformer, name):
            ratio = layers[module].scale / (layer.lora_alpha[name] / layer.r[name])
            down, up = adapters.factors(layer, name)
            down.weight.copy_(layers[module].down)
            up.weight.copy_(layers[module].up * ratio)
            if name + INITIAL in layer.lora_B:  # the file is a LoRA of the untouched base: nothing to subtract
                adapters.factors(layer, name + INITIAL)[1].weight.zero_()


def _check_same(expected: Mapping[str, Layer], exported: Mapping[str, Layer], destination: Path) -> None:
    """The gate of an export: the same change of every weight, up to the rounding of float32."""
    for module in expected.keys() | exported.keys():
        before, after = expected.get(module), exported.get(module)
        some = before or after
        assert some is not None
        reference = some.delta()
        difference = (torch.zeros_like(reference) if before is None else before.delta()) - (
            torch.zeros_like(reference) if after is None else after.delta()
        )
        if not difference.abs().max() <= 1e-5 * reference.abs().max():  # written so that NaN does not pass
            raise LoraFileError(f"{destination} was not written: {module} would not change as in the source")
