"""What is trained, for other programs: LoRA files in their dialects with a proof, a whole transformer as one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.config.registry import family_of_pipeline
from qwen_image_finetune.disk.files import staged_file
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.lora.dialects import under_authors_names, write_state
from qwen_image_finetune.lora.files import write
from qwen_image_finetune.lora.header import ADAPTER_METADATA, LoraFileError, read_metadata
from qwen_image_finetune.lora.layers import Changed, Layer, kind_of
from qwen_image_finetune.lora.metadata import adapter_metadata, network_metadata
from qwen_image_finetune.lora.names import Names, Naming, Native, authors_home, exactly
from qwen_image_finetune.lora.readers import readers_words
from qwen_image_finetune.lora.reading import read_lora
from qwen_image_finetune.lora.sources import TRANSFORMER, find_lora, find_tuned

Dialect = Literal["diffusers", "comfy", "kohya"]
TOLERANCE = 1e-5  # of the largest row of a change: roundings of float32 are a hundredth of it

EXPORTED = "qif.exported"  # metadata of an export: its dialect


def export(source: Path, destination: Path, dialect: Dialect, naming: Naming, overwrite: bool = False) -> list[str]:
    """Export a LoRA, or a transformer that was tuned as a whole; returns what to know of the result.

    Raises:
        OutputError: the destination is there already, without `overwrite`, or belongs to a run.
        LoraFileError: the source cannot be used, or not in this dialect.
    """
    if destination.suffix != ".safetensors":
        raise LoraFileError(f"{destination}: an export is a file that ends in .safetensors")
    check_output(destination, overwrite, is_export)
    tuned = find_tuned(source)
    if tuned is None:
        return _export_lora(source, destination, dialect, naming)
    if dialect == "diffusers":
        raise LoraFileError(
            f"{tuned / TRANSFORMER} is a whole transformer, already a folder as diffusers loads it; "
            "--format comfy makes one file of it"
        )
    return _export_transformer(tuned / TRANSFORMER, destination, naming.native)


def is_export(path: Path) -> bool:
    """Whether a file is an export of ours, which may be written again."""
    try:
        return EXPORTED in read_metadata(path)
    except LoraFileError:
        return False


def _export_lora(source: Path, destination: Path, dialect: Dialect, naming: Naming) -> list[str]:
    """Write a LoRA file again in another dialect.

    Returns:
        What was assumed of the source, and what each program makes of the result.

    Raises:
        LoraFileError: the source cannot be used, is of another family, or the exported file does not say the same.
    """
    path = find_lora(source)
    file = read_lora(path, naming)
    family, asked = file.metadata.get("qif.family"), family_of_pipeline(naming.pipeline.__name__)
    if family not in (None, asked):  # modules may be called alike, and would get the other model's names unnoticed
        raise LoraFileError(f"{path} is a LoRA of {family}, not of {asked}: export it with --family {family}")
    return [*file.notes, *write_checked(file.layers, destination, dialect, naming, file.metadata)]


def write_checked(
    layers: Mapping[str, Changed], destination: Path, dialect: Dialect, naming: Naming, metadata: Mapping[str, str]
) -> list[str]:
    """Write layers as a LoRA file that is read back, and kept only if it changes every weight as they do.

    Metadata is kept, except diffusers' own entry in other dialects: diffusers would apply its alpha a second time.

    Returns:
        What each program makes of the file.

    Raises:
        LoraFileError: the file does not say the same.
    """
    written = {name: layer.folded() for name, layer in layers.items()} if dialect == "diffusers" else layers
    modules = list(written if dialect == "diffusers" else under_authors_names(written, naming.native))
    about = {key: value for key, value in metadata.items() if key != ADAPTER_METADATA} | network_metadata(written)
    about[EXPORTED] = dialect
    if dialect == "diffusers":
        about |= adapter_metadata(written, exactly(written))
    with staged_file(destination) as partial:
        write(partial, write_state(written, naming.native, dialect), about)
        check_same(layers, read_lora(partial, naming).layers, destination)
    return readers_words(naming.readers, dialect, modules, kind_of(layers))


def _export_transformer(folder: Path, destination: Path, names: Names) -> list[str]:
    """Write a transformer's folder, whatever its shards, as one file under its authors' names, as ComfyUI loads it
    among its diffusion models; precision and values stay.

    Raises:
        LoraFileError: a file cannot be read, or parts of a matrix that is one in the authors' code are missing.
    """
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            state |= load_file(path)
        except SafetensorError as error:
            raise LoraFileError(f"{path} cannot be read: {error}; save the checkpoint again") from error
    with staged_file(destination, sum(tensor.nbytes for tensor in state.values())) as partial:
        save_file(authors_state(state, names, folder), partial, metadata={"format": "pt"})
    return ["a whole transformer: ComfyUI loads it from models/diffusion_models"]


def authors_state(state: Mapping[str, Tensor], names: Names, folder: Path) -> dict[str, Tensor]:
    """The tensors of a transformer in diffusers' layout as its authors' code has them."""
    home = authors_home(names)
    parts: dict[str, tuple[Native, dict[str, Tensor]]] = {}
    for key, tensor in state.items():
        module, _, ending = key.rpartition(".")
        name, native, template = home(module)
        ending = native.weight if ending == "weight" else ending
        parts.setdefault(f"{name}.{ending}", (native, {}))[1][template] = tensor
    whole: dict[str, Tensor] = {}
    for key, (native, tensors) in parts.items():
        if missing := [module for module in native.modules if module not in tensors]:
            raise LoraFileError(f"{folder}: {key} is made of {', '.join(native.modules)}; missing are {missing}")
        pieces = [tensors[module] for module in native.modules]
        pieces = list(pieces[0].chunk(2)[::-1]) if native.halves_swapped else pieces
        whole[key] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).contiguous()
    return whole


def check_same(expected: Mapping[str, Changed], exported: Mapping[str, Changed], destination: Path) -> None:
    """The gate of an export: the same change of every weight, up to the rounding of float32, row by row.

    Raises:
        LoraFileError: names the module that would change otherwise.
    """
    for module in expected.keys() | exported.keys():
        before, after = expected.get(module), exported.get(module)
        if not (isinstance(before, Layer | None) and isinstance(after, Layer | None)):
            if before is None or after is None or not _changes_alike(before, after):
                raise LoraFileError(f"{destination} was not written: {module} would not change as in the source")
            continue
        largest = max(float(row_norms([layer]).max()) for layer in (before, after) if layer is not None)
        between = row_norms([layer for layer in (before, after and negated(after)) if layer is not None])
        same = float(between.max()) <= TOLERANCE * largest  # written so that NaN does not pass
        if not (same and _same_lengths(before, after)):
            raise LoraFileError(f"{destination} was not written: {module} would not change as in the source")


def _changes_alike(before: Changed, after: Changed) -> bool:
    """Whether two layers change a weight alike, multiplied out; a random one stands for it."""
    outputs, inputs = before.shape
    if (outputs, inputs) != after.shape:
        return False
    weight = torch.randn(outputs or 64, inputs, generator=torch.Generator().manual_seed(0))
    first, second = before.change(weight), after.change(weight)
    largest = float(torch.linalg.norm(first, dim=1).max())
    return float(torch.linalg.norm(first - second, dim=1).max()) <= TOLERANCE * largest


def _same_lengths(before: Layer | None, after: Layer | None) -> bool:
    """Whether rows get the same lengths, where both have magnitudes, or none has."""
    first, second = (None if layer is None else layer.magnitude for layer in (before, after))
    if first is None or second is None:
        return first is second
    return torch.allclose(first, second, rtol=TOLERANCE, atol=0.0)


def negated(layer: Layer) -> Layer:
    """The opposite change."""
    return Layer(layer.down, -layer.up, layer.alpha)


def row_norms(layers: list[Layer]) -> Tensor:
    """Norm of each row of the sum of some layers' deltas, (out,) float64, without multiplying them out.

    With the factors side by side the sum is U D, its row i has the squared norm u_i (D Dᵀ) u_iᵀ, and D Dᵀ is as small
    as the ranks. float64 leaves 1e-8 of a norm where two layers cancel.
    """
    down = torch.cat([layer.down.double() for layer in layers])
    up = torch.cat([layer.up.double() * layer.scale for layer in layers], dim=1)
    return ((up @ (down @ down.T)) * up).sum(dim=1).clamp(min=0).sqrt()
