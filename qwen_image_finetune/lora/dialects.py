"""The dialects LoRA files are written in, and the way between them and module names of a transformer.

- diffusers: `transformer.MODULE.lora_A.weight`, the scale inside the factors: alpha is the rank
- comfy (ComfyUI, ai-toolkit): `diffusion_model.MODULE.lora_A.weight` and `.alpha`
- kohya (sd-scripts, musubi-tuner): `lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight` and `.alpha`

The last two call modules what the model's authors call them (`Family.lora_names`). Where query, key and value are one
fused matrix there, separate adapters are laid block-diagonally into one of the summed rank, which is exact, and taken
apart again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from qwen_image_finetune.lora.header import Declared, LoraFileError
from qwen_image_finetune.lora.layers import Layer
from qwen_image_finetune.lora.names import Names, Native, Places, flattened, numbered, split_key

# What keys are of that belong to no plain LoRA of a transformer, by an expression in them.
OTHER_KINDS = {
    r"lokr_": "LoKr",
    r"hada_": "LoHa",
    r"text_encoder|lora_te\d?_": "a text encoder",
    r"\.bias$": "trained biases",
    r"\.diff(_b)?$": "weight differences",
}


def read_state(
    state: Mapping[str, Tensor], places: Places, names: Names, declared: Declared, path: Path
) -> tuple[dict[str, Layer], list[str]]:
    """LoRA layers, in float32, by diffusers module name; and the modules whose alpha is written nowhere.

    Args:
        places: the modules there are.
        names: the authors' names of the model's modules.
        declared: alpha by the metadata of the file; counts where there is no alpha beside the weights.

    Raises:
        LoraFileError: a key is left over or there twice, a number is not finite, or a layer is incomplete.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    unmatched: list[str] = []
    for key, tensor in state.items():
        split = split_key(key)
        module = None if split is None else places.find(split[0])
        if split is None or module is None:
            unmatched.append(key)
            continue
        part = split[1]
        if part in groups.setdefault(module, {}):
            raise LoraFileError(f"{path}: {key} is the second {part} of {module}; a file must hold one LoRA")
        groups[module][part] = _finite(tensor, key, path)
    if unmatched:
        raise LoraFileError(unmatched_message(path, unmatched, len(state), places))
    layers: dict[str, Layer] = {}
    for module, parts in groups.items():
        template, number = numbered(module)
        native = names.get(template, Native((module,)))
        for part, piece in _take_apart(_layer(parts, module, declared, path), native, module, path).items():
            target = part.replace("{}", number)
            if target in layers:
                raise LoraFileError(f"{path}: {module} changes {target} a second time; a file must hold one LoRA")
            layers[target] = piece
    return layers, [module for module, parts in groups.items() if "alpha" not in parts and declared.alpha is None]


def write_state(layers: Mapping[str, Layer], names: Names, dialect: str) -> dict[str, Tensor]:
    """Tensors of a file in `dialect`, float32. Alpha is among them, except in diffusers' dialect, where other programs
    look for none: there the layers are `Layer.folded`, and change the weights alike whoever reads them."""
    if dialect == "diffusers":
        return {
            f"transformer.{module}.{part}": tensor.contiguous()
            for module, layer in layers.items()
            for part, tensor in (
                ("lora_A.weight", layer.folded().down), ("lora_B.weight", layer.folded().up), *_magnitudes(layer)
            )
        }  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, layer in under_authors_names(layers, names).items():
        down, up = ("lora_A", "lora_B") if dialect == "comfy" else ("lora_down", "lora_up")
        key = f"diffusion_model.{name}" if dialect == "comfy" else f"lora_unet_{flattened(name)}"
        state[f"{key}.{down}.weight"] = layer.down.contiguous()
        state[f"{key}.{up}.weight"] = layer.up.contiguous()
        state[f"{key}.alpha"] = torch.tensor(layer.alpha)
        state |= {f"{key}.{part}": tensor.contiguous() for part, tensor in _magnitudes(layer)}
    return state


def _magnitudes(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    """Those of a DoRA as peft and diffusers name them, and as ComfyUI takes them, which drop or pass over the others'.

    `dora_scale` alone, as LyCORIS writes it, is the magnitudes themselves.
    """
    if layer.magnitude is not None and layer.dora_scale is not None:
        yield "lora_magnitude_vector", layer.magnitude
        yield "dora_scale", layer.dora_scale[:, None]
    elif layer.magnitude is not None:
        yield "dora_scale", layer.magnitude[:, None]


def under_authors_names(layers: Mapping[str, Layer], names: Names) -> dict[str, Layer]:
    """Layers by the names that a model's authors give its modules; those of a fused matrix put together."""
    homes = {part: (name, native) for name, native in names.items() for part in native.modules}
    groups: dict[str, tuple[Native, dict[str, Layer]]] = {}
    for module, layer in layers.items():
        template, number = numbered(module)
        name, native = homes.get(template, (module, Native((template,))))
        groups.setdefault(name.replace("{}", number), (native, {}))[1][template] = layer
    return {name: _put_together(parts, native) for name, (native, parts) in groups.items()}


def unmatched_message(path: Path, keys: list[str], total: int, places: Places) -> str:
    """Why a file cannot be used: every key must find its place, or the picture is silently another one."""
    found = sorted({kind for mark, kind in OTHER_KINDS.items() if any(re.search(mark, key) for key in keys)})
    if found:
        reason = f" (it holds {', '.join(found)}; only plain LoRA layers of the transformer are supported)"
    elif plain := [split[0] for split in map(split_key, keys) if split is not None]:
        near = places.nearest(plain[0])
        reason = " (they are of plain LoRA layers, but no module is called so: of another model, or under names that "
        reason += f"are not known{'' if near is None else f'; the nearest is {near}'})"
    else:
        reason = ""
    shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"{path}: {len(keys)} of {total} keys have no place in this transformer{reason}: {shown}"


def _finite(tensor: Tensor, key: str, path: Path) -> Tensor:
    values = tensor.float()
    if bad := values.numel() - int(torch.isfinite(values).sum()):
        raise LoraFileError(
            f"{path}: {key} holds {bad} numbers that are not finite, of {values.numel()}: the LoRA is broken, as after "
            "a training that diverged; use an earlier checkpoint"
        )
    return values


def _layer(parts: Mapping[str, Tensor], module: str, declared: Declared, path: Path) -> Layer:
    if not {"down", "up"} <= parts.keys():
        raise LoraFileError(f"{path}: {module} has {' and '.join(sorted(parts))} only; a LoRA layer needs both factors")
    down, up = parts["down"], parts["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.numel():
        raise LoraFileError(
            f"{path}: {module} has factors {tuple(down.shape)} and {tuple(up.shape)} that do not multiply"
        )
    magnitude, dora_scale = parts.get("magnitude"), parts.get("dora_scale")
    for values in (magnitude, dora_scale):
        if values is not None and values.shape not in ((len(up),), (len(up), 1)):
            raise LoraFileError(
                f"{path}: {module} has magnitudes of {tuple(values.shape)}; a DoRA with one for each of its {len(up)} "
                "outputs can be read"
            )
    if magnitude is None:  # LyCORIS: under this name the magnitudes themselves
        magnitude, dora_scale = dora_scale, None
    lengths = [None if values is None else values.flatten() for values in (magnitude, dora_scale)]
    if "alpha" not in parts:
        return Layer(down, up, declared.alpha_of(module, down.shape[0]), *lengths)
    if parts["alpha"].numel() != 1:
        raise LoraFileError(f"{path}: {module} has an alpha of {parts['alpha'].numel()} numbers; it must be one")
    return Layer(down, up, float(parts["alpha"]), *lengths)


def _take_apart(layer: Layer, native: Native, module: str, path: Path) -> dict[str, Layer]:
    """Adapters of the diffusers modules in a fused one; those that change nothing, and have no block, are left out."""
    if native.halves_swapped:
        layer = layer.with_rows(swapped)
    if len(native.modules) == 1:
        return {native.modules[0]: layer}
    unit, rest = divmod(layer.up.shape[0], sum(native.rows))
    if rest:
        raise LoraFileError(f"{path}: {module} has {layer.up.shape[0]} outputs, which cannot be divided {native.rows}")
    starts = [unit * sum(native.rows[:place]) for place in range(len(native.rows) + 1)]
    parts = {
        name: layer.with_rows(itemgetter(slice(*starts[place : place + 2])))
        for place, name in enumerate(native.modules)
    }
    blocks = _diagonal({name: part.up for name, part in parts.items()}, layer.rank)
    if not blocks:  # one adapter trained on the fused matrix: its lower factor serves all of them
        return {name: part for name, part in parts.items() if part.magnitude is not None or part.up.any()}
    alpha = layer.alpha / len(blocks)
    return {
        name: replace(parts[name], down=layer.down[block], up=parts[name].up[:, block], alpha=alpha)
        for name, block in blocks.items()
    }


def _diagonal(ups: Mapping[str, Tensor], rank: int) -> dict[str, slice]:
    """The columns of each part, where parts of one rank lie block-diagonally in a fused matrix; empty where not.

    A part that changes nothing leaves its block empty, which is known by the place of the others.
    """
    columns = {name: up.any(dim=0).nonzero().flatten().tolist() for name, up in ups.items()}
    active = sum(map(bool, columns.values()))
    for count in range(len(ups), max(active, 1) - 1, -1):  # with fewer blocks, wider ones would hold them by chance
        own, rest = divmod(rank, count)
        found: dict[str, int] = {}
        waiting: list[str] = []
        for name, used in columns.items() if not rest else ():
            if not used:
                waiting.append(name)
                continue
            place = used[0] // own
            if place != used[-1] // own:
                break
            found.update(zip(waiting, range(len(found), place), strict=False))
            if len(found) != place:
                break
            found[name], waiting = place, []
        else:
            found.update(zip(waiting, range(len(found), count), strict=False))
            if len(found) == count:
                return {name: slice(place * own, (place + 1) * own) for name, place in found.items()}
    return {}


def _put_together(parts: Mapping[str, Layer], native: Native) -> Layer:
    """One adapter of a fused module out of those of its parts; rows of parts without one stay zero."""
    if len(native.modules) == 1:
        (layer,) = parts.values()
        return layer.with_rows(swapped) if native.halves_swapped else layer
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
    joined = Layer(torch.cat([parts[name].down for name in present]), up, first.scale * rank)
    if all(part.magnitude is None for part in parts.values()):
        return joined
    lengths = [(parts[name].magnitude, parts[name].dora_scale) if name in parts else (None, None)
               for name in native.modules]  # fmt: skip
    if missing := [name for name, (found, _) in zip(native.modules, lengths, strict=True) if found is None]:
        raise LoraFileError(
            f"{', '.join(present)} with magnitudes are one matrix with {', '.join(missing)} in the authors' code, and "
            "the lengths of its rows are not in the file; use --format diffusers, which ComfyUI reads too"
        )
    scales = [scale for _, scale in lengths if scale is not None]
    return replace(
        joined,
        magnitude=torch.cat([found for found, _ in lengths if found is not None]),
        dora_scale=torch.cat(scales) if len(scales) == len(lengths) else None,
    )


def swapped(rows: Tensor) -> Tensor:
    """The second half of some rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])
