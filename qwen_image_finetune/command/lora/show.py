"""`qif lora show` and `qif lora compare`: what is in a LoRA file, and how far two of them are apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.lora.files import opened, plain
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora.dialects import under_authors_names
from qwen_image_finetune.lora.export import Dialect
from qwen_image_finetune.lora.factoring import cosine
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.lora.layers import Changed, Layer, kind_of
from qwen_image_finetune.lora.readers import readers_words

SHOWN = ("ss_base_model_version", "qif.base", "ss_steps", "ss_resolution", "ss_learning_rate", "ss_output_name",
         "modelspec.date", "qif.version")  # fmt: skip


def show(source: Path, family: str | None) -> dict[str, Any]:
    """What `qif lora show` prints, as values.

    Raises:
        LoraFileError: the file is not there, broken, or of no family.
    """
    file, family = opened(source, family)
    dialect = dialect_of(file.path)
    naming = get_family(family).naming
    modules = list(file.layers if dialect == "diffusers" else under_authors_names(file.layers, naming.native))
    kind = kind_of(file.layers)
    return {
        "file": str(file.path),
        "kind": kind,
        "family": family,
        "format": dialect,
        "bytes": file.path.stat().st_size,
        "layers": len(file.layers),
        "ranks": sorted({layer.rank for layer in file.layers.values()}),
        "scales": sorted({round(layer.scale, 6) for layer in file.layers.values() if isinstance(layer, Layer)}),
        "parameters": sum(
            tensor.numel() for layer in file.layers.values() for tensor in layer.folded().tensors.values()
        ),
        "norms": {
            block: _total(norms)
            for block, layers in by_block(file.layers).items()
            if (norms := [float(norm) for layer in layers if (norm := layer.norm()) is not None])
        },
        "metadata": {key: file.metadata[key] for key in SHOWN if key in file.metadata},
        "read by": readers_words(naming.readers, dialect, modules, kind),
        "notes": file.notes,
    }


def show_words(found: dict[str, Any]) -> list[str]:
    """The same for a person: the largest change is drawn as a full bar."""
    lines = [
        f"{found['kind']} for {found['family']}, {found['bytes'] / 1e6:.1f} MB, written as {found['format']} does",
        f"{found['layers']} layers, {found['parameters']:,} numbers, rank {_few(found['ranks'])}"
        + (f", scale {_few(found['scales'])}" if found["scales"] else ""),
        *(f"{key:22} {value}" for key, value in found["metadata"].items()),
        "", "change of the weights, block by block (Frobenius norm)" if found["norms"] else
        "it turns the inputs of its layers; how far that changes a weight, the weight decides",
    ]  # fmt: skip
    most = max(found["norms"].values(), default=0.0) or 1.0
    for block, value in found["norms"].items():
        lines.append(f"  {block:32} {value:10.4g} {'#' * round(24 * value / most)}")
    return [*lines, "", *found["read by"], *(f"note: {note}" for note in found["notes"])]


def compare(first: Path, second: Path, family: str | None) -> dict[str, Any]:
    """How two LoRAs of one family differ, layer by layer.

    `cosine` is that of the angle between the two changes of a weight: 1 the same direction, 0 nothing in common.

    Raises:
        LoraFileError: one cannot be read, is no plain LoRA, or they are of two families.
    """
    (one, kind), (other, other_kind) = (opened(path, family) for path in (first, second))
    if kind != other_kind:
        raise LoraFileError(f"{one.path} is of {kind} and {other.path} of {other_kind}: their layers are others")
    first_layers, second_layers = plain(one, "compared"), plain(other, "compared")
    layers: dict[str, dict[str, Any]] = {
        name: {
            "cosine": cosine(layer, second_layers[name]),
            "norms": [float(layer.norm()), float(second_layers[name].norm())],
            "ranks": [layer.rank, second_layers[name].rank],
        }
        for name, layer in first_layers.items()
        if name in second_layers
    }
    norms = [_total(float(layer.norm()) for layer in each.values()) for each in (first_layers, second_layers)]
    inner = sum(each["cosine"] * each["norms"][0] * each["norms"][1] for each in layers.values())
    return {
        "family": kind,
        "files": [str(one.path), str(other.path)],
        "norms": norms,
        "cosine": inner / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0,
        "only in the first": [name for name in first_layers if name not in second_layers],
        "only in the second": [name for name in second_layers if name not in first_layers],
        "layers": layers,
    }


def compare_words(found: dict[str, Any]) -> list[str]:
    """The same for a person: the layers that agree least come first."""
    layers = sorted(found["layers"].items(), key=lambda item: item[1]["cosine"])
    lines = [
        f"cosine {found['cosine']:.4f} between the two changes; norms {found['norms'][0]:.4g} and "
        f"{found['norms'][1]:.4g}; {len(layers)} layers in both",
    ]
    for which in ("only in the first", "only in the second"):
        if names := found[which]:
            lines.append(f"{which}: {len(names)} layers, {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    lines += [
        f"  {each['cosine']:8.4f}  {each['norms'][0]:9.4g} {each['norms'][1]:9.4g}  {name}"
        for name, each in layers[:12]
    ]
    return [*lines, *([f"  ... and {len(layers) - 12} more"] if len(layers) > 12 else [])]


def by_block(layers: dict[str, Changed]) -> dict[str, list[Changed]]:
    """Layers by the block they are in, in the order of the file's blocks; the others by their own names."""
    found: dict[str, list[Changed]] = {}
    for name, layer in layers.items():
        match = re.match(r"(?:.*?\.)?\w*blocks\.\d+", name)
        found.setdefault(match[0] if match else name, []).append(layer)
    return dict(sorted(found.items(), key=lambda item: [int(x) if x.isdigit() else x for x in _split(item[0])]))


def dialect_of(path: Path) -> Dialect:
    """Which dialect the keys of a file are written in; the nearest one for other programs' own."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        keys = list(file.keys())
    if any(key.startswith(("lora_unet_", "lycoris_")) for key in keys):
        return "kohya"
    return "comfy" if any(key.startswith("diffusion_model.") for key in keys) else "diffusers"


def _split(name: str) -> list[str]:
    """Names and numbers apart, names first, so that block 2 stands before block 10."""
    return re.split(r"(?<=\.)(\d+)", name)


def _total(norms: Iterable[float]) -> float:
    return sum(value**2 for value in norms) ** 0.5


def _few(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:6]) + (", ..." if len(values) > 6 else "")
