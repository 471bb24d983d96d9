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
from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from qwen_image_finetune.lora.header import Declared, LoraFileError
from qwen_image_finetune.lora.layers import Changed, Layer
from qwen_image_finetune.lora.names import PARTS, Names, Native, Places, authors_home, flattened, numbered, split_key
from qwen_image_finetune.lora.other_layers import Hadamard, Kronecker, Other, Rotation

# What keys are of that belong to no plain LoRA of a transformer, by an expression in them.
KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
OTHER_KINDS = {
    r"lokr_t2|hada_t[12]": "layers of convolutions",
    r"oft_blocks|oft_diag": "an OFT on the side of outputs",
    r"text_encoder|lora_te\d?_": "a text encoder",
    r"\.bias$": "trained biases",
    r"\.diff(_b)?$": "weight differences",
}


def read_state(
    state: Mapping[str, Tensor], places: Places, names: Names, declared: Declared, path: Path
) -> tuple[dict[str, Changed], list[str]]:
    """Adapted layers, in float32, by diffusers module name; and the modules whose alpha is written nowhere.

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
    layers: dict[str, Changed] = {}
    for module, parts in groups.items():
        template, number = numbered(module)
        native = names.get(template, Native((module,)))
        for part, piece in _take_apart(_layer(parts, module, declared, path), native, module, path).items():
            target = part.replace("{}", number)
            if target in layers:
                raise LoraFileError(f"{path}: {module} changes {target} a second time; a file must hold one LoRA")
            layers[target] = piece
    if len(kinds := {type(layer) for layer in layers.values()}) > 1:
        titles = ", ".join(sorted(kind.title for kind in kinds))
        raise LoraFileError(f"{path} holds layers of different kinds ({titles}); a file must hold one LoRA")
    unsaid = [module for module, parts in groups.items() if {"alpha", "down"} & parts.keys() == {"down"}]
    return layers, unsaid if declared.alpha is None else []


def write_state(layers: Mapping[str, Changed], names: Names, dialect: str) -> dict[str, Tensor]:
    """Tensors of a file in `dialect`, float32. Alpha is among them, except in diffusers' dialect, where other programs
    look for none: there the layers are `Layer.folded`, and change the weights alike whoever reads them."""
    if dialect == "diffusers":
        return {
            f"transformer.{module}.{part}": tensor.contiguous()
            for module, layer in layers.items()
            for part, tensor in layer.folded().tensors.items()
        }
    state: dict[str, Tensor] = {}
    for name, layer in under_authors_names(layers, names).items():
        key = f"diffusion_model.{name}" if dialect == "comfy" else f"lora_unet_{flattened(name)}"
        if isinstance(layer, Layer):
            state[f"{key}.alpha"] = torch.tensor(layer.alpha)
        for part, tensor in (layer if isinstance(layer, Layer) else layer.folded()).tensors.items():
            state[f"{key}.{KOHYA.get(part, part) if dialect == 'kohya' else part}"] = tensor.contiguous()
    return state


def under_authors_names(layers: Mapping[str, Changed], names: Names) -> dict[str, Changed]:
    """Layers by the names that a model's authors give its modules; those of a fused matrix put together."""
    home = authors_home(names)
    groups: dict[str, tuple[Native, dict[str, Changed]]] = {}
    for module, layer in layers.items():
        name, native, template = home(module)
        groups.setdefault(name, (native, {}))[1][template] = layer
    return {name: _under_one_name(parts, native) for name, (native, parts) in groups.items()}


def _under_one_name(parts: Mapping[str, Changed], native: Native) -> Changed:
    loras = {name: layer for name, layer in parts.items() if isinstance(layer, Layer)}
    if len(loras) == len(parts):
        return _put_together(loras, native)
    [layer, *_] = parts.values()
    if isinstance(layer, Rotation):
        raise LoraFileError(
            f"an OFT on the side of inputs is known to peft and to this project, and to no other format than "
            f"diffusers'; {', '.join(parts)} cannot be written"
        )
    if len(native.modules) > 1 or native.halves_swapped:
        raise LoraFileError(
            f"{', '.join(parts)}: in the authors' code they are parts of a matrix, or its rows are in another order, "
            f"which a {layer.title} of theirs cannot be; use --format diffusers"
        )
    return layer


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


def _layer(parts: Mapping[str, Tensor], module: str, declared: Declared, path: Path) -> Changed:
    if not {"down", "up"} & parts.keys():
        return _of_another_kind(parts, module, path)
    if strangers := sorted(parts.keys() - set(PARTS)):
        raise LoraFileError(
            f"{path}: {module} has {', '.join(strangers)} beside the factors of a LoRA; an adapter is a LoRA, "
            "LoKr, LoHa or OFT"
        )
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


def _of_another_kind(parts: Mapping[str, Tensor], module: str, path: Path) -> Changed:
    """A LoKr, LoHa or OFT. Alpha counts by the rank of a factor, where there is one: comfy/weight_adapter."""
    given = {name: tensor for name, tensor in parts.items() if name != "alpha"}
    try:
        found = next(kind for kind in (Kronecker, Hadamard, Rotation) if kind.parts_begin in next(iter(given)))
        layer: Other = found.of(given)
        if "alpha" in parts and (rank := layer.inner_rank) is not None:
            layer = layer.scaled(float(parts["alpha"]) / rank)
        return layer
    except (StopIteration, KeyError, ValueError, IndexError) as error:
        raise LoraFileError(
            f"{path}: {module} has {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in parts.items())}, "
            "which is no whole LoKr, LoHa or OFT"
        ) from error


def _take_apart(layer: Changed, native: Native, module: str, path: Path) -> dict[str, Changed]:
    """Adapters of the diffusers modules in a fused one; those that change nothing, and have no block, are left out."""
    if not isinstance(layer, Layer):
        if len(native.modules) == 1 and not native.halves_swapped:
            return {native.modules[0]: layer}
        raise LoraFileError(f"{path}: {module} is made of {', '.join(native.modules)}, and a {layer.title} of all of "
                            "it cannot be taken apart")  # fmt: skip
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
