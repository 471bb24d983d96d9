"""A transformer from its files, each weight straight into its final precision and place.

The model is built without weights first. Then the files are gone through tensor by tensor (they are mapped, not read
into memory), and each tensor is converted alone, on the device where it stays. At no time is more of the model in full
precision than what stays so, and one layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.levers.model_files import Checkpoint, opened, skeleton
from qwen_image_finetune.levers.quantize import Report, candidates, quantised_within_bound, replace, report
from qwen_image_finetune.levers.quantized_linear import (
    LARGEST,
    SCALE_BLOCK,
    QuantizedLinear,
    bitsandbytes_functional,
)
from qwen_image_finetune.levers.single_file import OF_ANOTHER, SingleFile
from qwen_image_finetune.levers.stored_precision import (
    FOUR_BITS,
    FP8_SCALES,
    PACKED,
    SIDE_NOTES,
    Precision,
    StoredTensor,
    tensor_index,
)
from qwen_image_finetune.levers.swap import swapped_names
from qwen_image_finetune.lora.merging import Change

MARK_OF_2511 = "__index_timestep_zero__"  # what ComfyUI's files of that model have

# Tensors beside the weight of a layer that comes quantised: its scales, and what bitsandbytes packs with 4-bit codes.
BESIDE_QUANTISED = (
    "SCB", *FP8_SCALES, *(f"{PACKED}{code}" for code in FOUR_BITS),
    *(f"weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
)  # fmt: skip


def load(
    cls: type[nn.Module],
    folder: Path,
    precision: Precision,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    blocks_to_swap: int = 0,
    file: SingleFile | None = None,
    change: Change | None = None,
) -> tuple[nn.Module, Report | None]:
    """A frozen model from a folder in diffusers layout; the report says what was quantised, None if nothing was.

    Args:
        precision: what `base_precision` says about the folder.
        dtype: of everything that is not quantised.
        blocks_to_swap: how many blocks `levers.swap` will be asked to swap; their weights stay in host memory.
        file: has the weights in place of the folder, which has the configuration.
        change: is added to the weights before they are rounded or quantised; a layer that came quantised is quantised
            again, in its format.

    Raises:
        ConfigError: tensors are missing, left over or of another shape, or stored in a layout that is not known here.
    """
    model = skeleton(cls, folder)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)  # those that are not in files keep their precision, as in diffusers
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    parameters = [name for name, _ in model.named_parameters()]
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name, _ in candidates(model)} if precision.format else set()
    wanted = set() if precision.stored else {f"{name}.weight" for name in inside}
    swapped = swapped_names(model, blocks_to_swap) if blocks_to_swap else ()
    keeps = set(getattr(cls, "_keep_in_fp32_modules", None) or ())  # as diffusers does
    errors: dict[str, float] = {}
    kept: dict[str, float] = {}
    merged: dict[str, float] = {}
    with opened(file or folder) as checkpoint:
        for key in checkpoint.tensors:
            name = key.removesuffix(".weight")
            if key not in shapes:
                continue
            home = "cpu" if key.startswith(swapped) else device
            changes = change if change is not None and change.touches(name) and key.endswith(".weight") else None
            format, may_compute_in_8_bits, noted = precision.format if key in wanted else None, True, errors
            if name in linear and _is_quantised(checkpoint.tensors, name):
                layer = _stored_layer(checkpoint, name, shapes[key], home, may_compute_in_8_bits=name in inside)
                if changes is None:
                    replace(model, name, layer)
                    continue
                weight, noted = layer.dequantised(torch.float32), merged
                format, may_compute_in_8_bits = layer.format, layer.may_compute_in_8_bits
            else:
                _check_shape(checkpoint.source, key, checkpoint.tensors[key].shape, shapes[key])
                weight = checkpoint.read(key).to(home)
            if changes is not None:
                weight = changes.added_to(name, weight)
            if format is not None:
                new, error = quantised_within_bound(weight, format)
                (kept if new is None else noted)[name] = error
                if new is not None:
                    new.may_compute_in_8_bits = may_compute_in_8_bits
                    new.will_run_on(new.weight.device)
                    replace(model, name, new)
                    continue
            precise = not keeps.isdisjoint(key.split("."))
            _put(model, key, weight.to(torch.float32 if precise else dtype, copy=True))
        _check_complete(type(model).__name__, parameters, file or folder, checkpoint.tensors, checkpoint.unread)
    if precision.format is None:
        return model, None
    return model, report(model, precision.format, errors, kept, precision.stored, merged)


def _put(model: nn.Module, key: str, tensor: Tensor) -> None:
    parent, _, name = key.rpartition(".")
    module = model.get_submodule(parent)
    if name in dict(module.named_buffers(recurse=False)):
        module.register_buffer(name, tensor)
    else:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _check_complete(
    kind: str,
    parameters: Iterable[str],
    source: Path | SingleFile,
    tensors: Mapping[str, StoredTensor],
    unread: Iterable[str],
) -> None:
    missing = [name for name in parameters if name not in tensors]
    left = [key for key in unread if key.rpartition(".")[2] not in SIDE_NOTES]
    if not missing and not left:
        return
    remedy = "download the checkpoint again, or upgrade diffusers"
    if isinstance(source, SingleFile):
        left = [tensors[key].key for key in left]
        remedy = OF_ANOTHER
    raise ConfigError(
        f"{source.path if isinstance(source, SingleFile) else source}: {len(missing)} weights of a {kind} are missing "
        f"{missing[:3]}, {len(left)} of its tensors are not known {left[:3]}; {remedy}"
    )


def _check_shape(folder: Path, key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ConfigError(f"{folder}: {key} is {found}, config.json makes it {wanted}")


def check_tensors(model: nn.Module, source: Path | SingleFile) -> None:
    """Compare the tensors of a folder in diffusers layout, or of one file, with a model that has no adapter; of weights
    only headers are read.

    Raises:
        ConfigError: `load` would find tensors missing, left over or of another shape.
    """
    place, tensors = (
        (source.path, source.tensors()) if isinstance(source, SingleFile) else (source, tensor_index(source))
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    quantised = {
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in tensors and _is_quantised(tensors, name)
    }  # fmt: skip
    beside = {f"{name}.{ending}" for name in quantised for ending in BESIDE_QUANTISED}
    unread = [key for key in tensors if key not in shapes and key not in beside]
    _check_complete(type(model).__name__, [name for name, _ in model.named_parameters()], source, tensors, unread)
    for key, shape in shapes.items():
        if key in tensors and _code(tensors, key.removesuffix(".weight")) is None:  # codes have it written elsewhere
            _check_shape(place, key, tensors[key].shape, shape)
    for name in quantised:
        for key in (f"{name}.{ending}" for ending in FP8_SCALES):
            if key in tensors and math.prod(tensors[key].shape) not in (1, shapes[f"{name}.weight"][0]):
                raise _strange_scale(place, key, tensors[key].shape, shapes[f"{name}.weight"][0])
    if MARK_OF_2511 in tensors and not cast(Any, model).config.get("zero_cond_t", False):
        raise ConfigError(
            f"{place} is of Qwen-Image-Edit-2511 ({MARK_OF_2511}), whose references are modulated at t = 0; "
            "model.pretrained_model_name_or_path is of a model that has them otherwise: name Qwen/Qwen-Image-Edit-2511"
        )


# Layers that come quantised


def _is_quantised(tensors: Mapping[str, StoredTensor], name: str) -> bool:
    return tensors[f"{name}.weight"].dtype in ("F8_E4M3", "I8") or _code(tensors, name) is not None


def _code(tensors: Mapping[str, StoredTensor], name: str) -> str | None:
    """Which 4-bit code a linear layer is packed in, if it is."""
    return next((code for code in FOUR_BITS if f"{name}.{PACKED}{code}" in tensors), None)


def _stored_layer(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], device: torch.device | str, may_compute_in_8_bits: bool
) -> QuantizedLinear:
    """The linear layer `name` as it is stored, nothing rounded a second time."""
    out, columns = shape
    code = _code(checkpoint.tensors, name)
    if code is not None:
        return _packed_layer(checkpoint, name, (out, columns), code, device)
    key = f"{name}.weight"
    _check_shape(checkpoint.source, key, checkpoint.tensors[key].shape, shape)
    weight = checkpoint.read(key).to(device, copy=True)
    if weight.dtype == torch.int8:
        scale = _scale(checkpoint, f"{name}.SCB", out) / LARGEST["int8"]
        return QuantizedLinear("int8", (out, columns), weight, {"scale": scale.to(device)})
    scales = [f"{name}.{ending}" for ending in FP8_SCALES if f"{name}.{ending}" in checkpoint.tensors]
    scale = _scale(checkpoint, scales[0], out) if scales else torch.ones(out, 1)
    return QuantizedLinear(
        "fp8",
        (out, columns),
        weight.view(torch.uint8),
        {"scale": scale.to(device)},
        may_compute_in_8_bits=may_compute_in_8_bits,
    )


def _scale(checkpoint: Checkpoint, key: str, rows: int) -> Tensor:
    """Scales (rows, 1) float32 from one number, or one a row.

    Raises:
        ConfigError: there are others, as many as blocks of a weight, say.
    """
    if key not in checkpoint.tensors:
        raise ConfigError(f"{checkpoint.source}: {key} is missing: download the checkpoint again")
    scale = checkpoint.read(key)
    if scale.numel() not in (1, rows):
        raise _strange_scale(checkpoint.source, key, tuple(scale.shape), rows)
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def _strange_scale(place: Path, key: str, shape: tuple[int, ...], rows: int) -> ConfigError:
    return ConfigError(f"{place}: {key} is {shape}; known are one scale, or one for each of {rows} rows")


def _packed_layer(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], code: str, device: torch.device | str
) -> QuantizedLinear:
    """A layer of bitsandbytes' 4-bit codes, from its weight and the tensors of its quantisation state."""
    bitsandbytes_functional(f"the {code} checkpoint {checkpoint.source}")
    prefix = f"{name}.weight."
    about = json.loads(bytes(checkpoint.read(f"{name}.{PACKED}{code}").tolist()))
    nested = f"{prefix}nested_absmax" in checkpoint.tensors
    if tuple(about["shape"]) != shape or (nested and about["nested_blocksize"] != SCALE_BLOCK):
        raise ConfigError(
            f"{checkpoint.source}: {name} is packed as {about}; expected are the shape {shape} of config.json, and "
            f"blocks of {SCALE_BLOCK} where the scales themselves are in 8 bits"
        )
    checkpoint.unread.pop(f"{prefix}quant_map", None)  # the code itself, which goes by its name
    state = {"absmax": checkpoint.read(f"{prefix}absmax")}
    if nested:
        state["absmax_scale"] = checkpoint.read(f"{prefix}nested_absmax").float()
        state["absmax_code"] = checkpoint.read(f"{prefix}nested_quant_map").float()
        state["absmax_offset"] = torch.tensor(float(about["nested_offset"]))
    weight = checkpoint.read(f"{name}.weight").view(torch.uint8).reshape(-1, 1)  # stored in a wider dtype for FSDP
    stored = {key: tensor.to(device, copy=True) for key, tensor in state.items()}
    return QuantizedLinear(code, shape, weight.to(device, copy=True), stored, blocksize=about["blocksize"])
