"""The dialects LoRA files are written in, and the way between them and module names of a transformer.

- diffusers: `transformer.MODULE.lora_A.weight`, alpha in the metadata
- comfy (ComfyUI, ai-toolkit): `diffusion_model.MODULE.lora_A.weight` and `.alpha`
- kohya (sd-scripts, musubi-tuner): `lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight` and `.alpha`

The last two call modules what the model's authors call them (`Family.lora_names`). Where query, key and value are one
fused matrix there, separate adapters are laid block-diagonally into one of the summed rank, which is exact, and taken
apart again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen_image_finetune.lora.adapters import Layer
from qwen_image_finetune.lora.header import Declared, Key, LoraFileError, parse_key
from qwen_image_finetune.lora.names import Names, Native


def read_state(
    state: Mapping[str, Tensor],
    names: Names,
    declared: Declared,
    modules: Iterable[str],
    path: Path,
) -> dict[str, Layer]:
    """LoRA layers, in float32, by diffusers module name.

    Args:
        names: the authors' names of the model's modules.
        declared: alpha by the metadata of the file; counts where there is no alpha beside the weights.
        modules: names that flattened keys may mean.

    Raises:
        LoraFileError: a key is left over or there twice, or a layer is incomplete.
    """
    flat = {**{_flatten(module): module for module in modules}, **{_flatten(name): name for name in names}}
    groups: dict[str, dict[str, Tensor]] = {}
    unmatched: list[str] = []
    for name, tensor in state.items():
        key = parse_key(name)
        module = None if key is None else _unflatten(key, flat)
        if key is None or module is None:
            unmatched.append(name)
        elif key.part in groups.setdefault(module, {}):
            raise LoraFileError(f"{path}: {name} is the second {key.part} of {module}; a file must hold one LoRA")
        else:
            groups[module][key.part] = tensor
    if unmatched:
        raise LoraFileError(unmatched_message(path, unmatched, len(state)))
    layers: dict[str, Layer] = {}
    for module, parts in groups.items():
        template, number = _template(module)
        native = names.get(template, Native((module,)))
        layer = _layer(parts, module, declared if native.modules == (module,) else Declared(), path)
        for target, piece in _take_apart(layer, native, module, path).items():
            layers[target.replace("{}", number)] = piece
    return layers


def write_state(layers: Mapping[str, Layer], names: Names, dialect: str) -> dict[str, Tensor]:
    """Tensors of a file in `dialect`, float32. Alpha is among them; diffusers alone has it in the metadata."""
    if dialect == "diffusers":
        return {
            f"transformer.{module}.{part}.weight": tensor.contiguous()
            for module, layer in layers.items()
            for part, tensor in (("lora_A", layer.down), ("lora_B", layer.up))
        }
    homes = {part: (name, native) for name, native in names.items() for part in native.modules}
    groups: dict[str, tuple[Native, dict[str, Layer]]] = {}
    for module, layer in layers.items():
        template, number = _template(module)
        name, native = homes.get(template, (module, Native((template,))))
        groups.setdefault(name.replace("{}", number), (native, {}))[1][template] = layer
    state: dict[str, Tensor] = {}
    for name, (native, parts) in groups.items():
        layer = _put_together(parts, native)
        down, up = ("lora_A", "lora_B") if dialect == "comfy" else ("lora_down", "lora_up")
        key = f"diffusion_model.{name}" if dialect == "comfy" else f"lora_unet_{_flatten(name)}"
        state[f"{key}.{down}.weight"] = layer.down.contiguous()
        state[f"{key}.{up}.weight"] = layer.up.contiguous()
        state[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return state


def unmatched_message(path: Path, keys: list[str], total: int) -> str:
    """Why a file cannot be used: every key must find its place, or the picture is silently another one."""
    kinds = {
        "dora_scale": "DoRA",
        "lora_magnitude": "DoRA",
        "lokr_": "LoKr",
        "hada_": "LoHa",
        "text_encoder": "a text encoder",
        "lora_te": "a text encoder",
        ".bias": "trained biases",
        ".diff": "weight differences",
    }
    found = sorted({kind for part, kind in kinds.items() if any(part in key for key in keys)})
    reason = f" (it holds {', '.join(found)}; only plain LoRA layers of the transformer are supported)" if found else ""
    shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"{path}: {len(keys)} of {total} keys have no place in this transformer{reason}: {shown}"


def _layer(parts: Mapping[str, Tensor], module: str, declared: Declared, path: Path) -> Layer:
    if not {"down", "up"} <= parts.keys():
        raise LoraFileError(f"{path}: {module} has {' and '.join(sorted(parts))} only; a LoRA layer needs both factors")
    down, up = parts["down"].float(), parts["up"].float()
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.numel():
        raise LoraFileError(
            f"{path}: {module} has factors {tuple(down.shape)} and {tuple(up.shape)} that do not multiply"
        )
    if "alpha" not in parts:
        return Layer(down, up, declared.alpha_of(module, down.shape[0]))
    if parts["alpha"].numel() != 1:
        raise LoraFileError(f"{path}: {module} has an alpha of {parts['alpha'].numel()} numbers; it must be one")
    return Layer(down, up, float(parts["alpha"]))


def _take_apart(layer: Layer, native: Native, module: str, path: Path) -> dict[str, Layer]:
    """Adapters of the diffusers modules inside a fused one; those that change nothing are left out."""
    if native.halves_swapped:
        layer = replace(layer, up=torch.cat(layer.up.chunk(2)[::-1]))
    if len(native.modules) == 1:
        return {native.modules[0]: layer}
    unit, rest = divmod(layer.up.shape[0], sum(native.rows))
    if rest:
        raise LoraFileError(f"{path}: {module} has {layer.up.shape[0]} outputs, which cannot be divided {native.rows}")
    ups = dict(zip(native.modules, layer.up.split([unit * share for share in native.rows]), strict=True))
    active = [name for name, up in ups.items() if up.any()] or list(ups)
    rank = layer.rank // len(active)
    blocks = {name: slice(index * rank, (index + 1) * rank) for index, name in enumerate(active)}
    diagonal = layer.rank == rank * len(active) and all(
        torch.count_nonzero(ups[name]) == torch.count_nonzero(ups[name][:, block]) for name, block in blocks.items()
    )
    if not diagonal:  # one adapter trained on the fused matrix: its lower factor serves all of them
        return {name: Layer(layer.down, ups[name], layer.alpha) for name in active}
    return {
        name: Layer(layer.down[block], ups[name][:, block], layer.alpha / len(active)) for name, block in blocks.items()
    }


def _put_together(parts: Mapping[str, Layer], native: Native) -> Layer:
    """One adapter of a fused module out of those of its parts; rows of parts without one stay zero."""
    if len(native.modules) == 1:
        (layer,) = parts.values()
        return replace(layer, up=torch.cat(layer.up.chunk(2)[::-1])) if native.halves_swapped else layer
    present = [name for name in native.modules if name in parts]
    first = parts[present[0]]
    unit = first.up.shape[0] // native.rows[native.modules.index(present[0])]
    rank = sum(parts[name].rank for name in present)
    up = first.up.new_zeros(unit * sum(native.rows), rank)
    row = column = 0
    for name, share in zip(native.modules, native.rows, strict=True):
        if name in parts:
            part = parts[name]
            up[row : row + unit * share, column : column + part.rank] = part.up * (part.scale / first.scale)
            column += part.rank
        row += unit * share
    return Layer(torch.cat([parts[name].down for name in present]), up, first.scale * rank)


def _template(module: str) -> tuple[str, str]:
    """'single_blocks.7.linear1' -> 'single_blocks.{}.linear1', '7'."""
    match = re.search(r"(?<=blocks\.)\d+", module)
    return (module, "") if match is None else (module[: match.start()] + "{}" + module[match.end() :], match[0])


def _flatten(module: str) -> str:
    return module.replace(".", "_")


def _unflatten(key: Key, flat: Mapping[str, str]) -> str | None:
    if not key.flat:
        return key.module
    match = re.search(r"(?<=blocks_)\d+", key.module)
    if match is not None:
        template = flat.get(key.module[: match.start()] + "{}" + key.module[match.end() :])
        if template is not None:
            return template.replace("{}", match[0])
    return flat.get(key.module)
