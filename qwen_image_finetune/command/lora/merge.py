"""`qif lora merge`: a base with a LoRA inside, as a checkpoint for diffusers or as one file for ComfyUI."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.command.lora.base import NUMBERS, base_of, number
from qwen_image_finetune.command.lora.files import check_place
from qwen_image_finetune.disk.files import Staged, staged_file, staged_folder
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.disk.tensors import TensorFile
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.levers import model_files
from qwen_image_finetune.levers.model_files import Checkpoint
from qwen_image_finetune.levers.single_file import ALL_FORMATS, E4M3
from qwen_image_finetune.levers.stored_precision import FP8_SCALES, SIDE_NOTES
from qwen_image_finetune.lora.export import EXPORTED, authors_state
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.lora.merging import Change, read_change_of
from qwen_image_finetune.lora.names import Names, authors_home
from qwen_image_finetune.lora.sources import TRANSFORMER
from qwen_image_finetune.lora.targets import linear_modules

Precision = Literal["bf16", "fp32", "fp8"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The largest rounding of a number, as a share of it.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float8_e4m3fn: 2.0**-4}
LARGEST = torch.finfo(torch.float8_e4m3fn).max
Pieces = dict[str, Tensor]  # tensors of the output, by name


def merge(
    loras: Iterable[tuple[Path, float]],
    base: str,
    output: Path,
    single: bool,
    precision: Precision,
    overwrite: bool,
) -> list[str]:
    """Write a base whose weights have LoRAs added, W + sum strength (W' - W), tensor by tensor.

    Args:
        loras: files with their strengths.
        base: checkpoint in diffusers layout.
        output: folder of a whole checkpoint, whose other parts are those of the base; or, if single, a file.
        precision: fp8 is e4m3 with one scale for each weight of a block, as ComfyUI distributes models; single files
            alone.

    Returns:
        What was done, and how much of the change the precision rounds away.

    Raises:
        ConfigError, LoraFileError: something cannot be read or does not fit, or what was written is wrong.
        OutputError: the output may not be written.
    """
    if precision == "fp8" and not single:
        raise LoraFileError("--precision fp8 is for one file: diffusers reads no scales; add --single-file")
    if single:
        check_place(output, overwrite)
    else:
        check_output(output, overwrite, folder=True)
    folder, family = base_of(base)
    empty = loading.empty_transformer(family, folder, torch.bfloat16)
    change = read_change_of(empty, loras, family.naming)
    with model_files.opened(folder / TRANSFORMER) as checkpoint:
        writer = _Writer(checkpoint, family, change, set(linear_modules(empty)), single, precision)
        if single:
            with staged_file(output, writer.size) as partial:
                lost = writer.write(partial)
        else:
            with staged_folder(output, writer.size, sealed=False) as stage:
                _rest_of(folder, stage)
                (stage / TRANSFORMER).mkdir()
                shutil.copyfile(folder / TRANSFORMER / "config.json", stage / TRANSFORMER / "config.json")
                lost = writer.write(Staged(stage / TRANSFORMER / WEIGHTS))
    return [*change.words(), f"rounding to {precision} takes {lost:.2%} of the change"]


def _rest_of(folder: Path, stage: Staged) -> None:
    """The other parts of a checkpoint: links to the same bytes where the disk can, else copies."""
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        if place.parts[0] == TRANSFORMER or file.is_dir() or any(part.startswith(".") for part in place.parts):
            continue
        (stage / place).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), stage / place)
        except OSError:  # another disk
            shutil.copyfile(file, stage / place)


class _Writer:
    """Goes over the tensors of a base, group by group: what is one matrix in the output is one group."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        change: Change,
        linear: set[str],
        single: bool,
        precision: Precision,
    ) -> None:
        self.checkpoint, self.change, self.linear, self.precision = checkpoint, change, linear, precision
        self.names: Names | None = family.naming.native if single else None
        beside = (*FP8_SCALES, *SIDE_NOTES)
        keys = [key for key in checkpoint.tensors if key.rpartition(".")[2] not in beside]
        self.groups = list(_groups(keys, self.names)) if self.names is not None else [[key] for key in keys]
        self.announced: Pieces = {}
        self.scaled: list[str] = []
        for group in self.groups:
            for name, tensor in self._pieces(group, self._empty).items():
                if self._is_scaled(name, tensor, group):
                    self.scaled.append(name.removesuffix(".weight"))
                    self.announced[name] = tensor.to(torch.float8_e4m3fn)
                    self.announced[f"{self.scaled[-1]}.weight_scale"] = torch.empty((), device="meta")
                else:
                    self.announced[name] = tensor.to(self._type(tensor))
        self.size = sum(tensor.numel() * tensor.element_size() for tensor in self.announced.values())

    def write(self, path: Staged) -> float:
        """Write the file and compare it with what it should hold; returns the share of the change that rounding takes.

        Raises:
            LoraFileError: a weight is not what it should be.
        """
        about = {"format": "pt", EXPORTED: "merged"}
        if self.scaled:
            formats = {name: {"format": E4M3} for name in self.scaled}
            about[ALL_FORMATS] = json.dumps({"format_version": "1.0", "layers": formats})
        with TensorFile(path, self.announced, about) as file:
            for group in self.groups:
                for name, tensor in self._pieces(group, self._changed).items():
                    for piece, value in self._stored(name, tensor).items():
                        file.write(piece, value)
        return self._check(path)

    def _check(self, path: Path) -> float:
        from safetensors import safe_open

        lost = whole = 0.0
        with safe_open(path, framework="pt") as file:
            for group in self.groups:
                touched = any(self.change.touches(key.removesuffix(".weight")) for key in group)
                original = self._pieces(group, lambda key: number(self.checkpoint, key)) if touched else {}
                for name, wanted in self._pieces(group, self._changed).items():
                    stored = file.get_tensor(name)
                    found = stored.to(wanted.dtype)
                    bound = ROUNDING.get(stored.dtype, 0.0) * wanted.abs()
                    if name.removesuffix(".weight") in self.scaled:
                        scale = file.get_tensor(f"{name.removesuffix('.weight')}.weight_scale")
                        found = found * scale
                        bound = bound * 1.001 + scale * 2.0**-10  # the smallest e4m3 numbers are 2^-9 apart
                    if not bool(((found - wanted).abs() <= bound * 1.001).all()):
                        raise LoraFileError(f"nothing was written: {name} would not be what it should")
                    if touched:
                        lost += float((found - wanted).square().sum())
                        whole += float((wanted - original[name]).square().sum())
        return (lost / whole) ** 0.5 if whole else 0.0

    def _pieces(self, group: list[str], tensor: Callable[[str], Tensor]) -> Pieces:
        """What a group is in the output."""
        state = {key: tensor(key) for key in group}
        return state if self.names is None else authors_state(state, self.names, self.checkpoint.source)

    def _empty(self, key: str) -> Tensor:
        entry = self.checkpoint.tensors[key]
        kind = torch.float32 if entry.dtype in NUMBERS else torch.int64
        return torch.empty(entry.shape, dtype=kind, device="meta")

    def _changed(self, key: str) -> Tensor:
        """A tensor of the merged model: float32 where it is of numbers."""
        if self.checkpoint.tensors[key].dtype not in NUMBERS:
            return self.checkpoint.read(key)
        tensor = number(self.checkpoint, key)
        module, _, part = key.rpartition(".")
        return self.change.added_to(module, tensor) if part == "weight" and self.change.touches(module) else tensor

    def _is_scaled(self, name: str, tensor: Tensor, group: list[str]) -> bool:
        modules = [key.rpartition(".")[0] for key in group]
        in_blocks = all("blocks." in module and module in self.linear for module in modules)
        return self.precision == "fp8" and name.endswith(".weight") and tensor.ndim == 2 and in_blocks

    def _type(self, tensor: Tensor) -> torch.dtype:
        return TYPES.get(self.precision, torch.bfloat16) if tensor.is_floating_point() else tensor.dtype

    def _stored(self, name: str, tensor: Tensor) -> Pieces:
        """A tensor as it is written, with its scale."""
        if not bool(torch.isfinite(tensor).all()):
            raise LoraFileError(f"{name} would hold numbers that are not finite: nothing was written")
        module = name.removesuffix(".weight")
        if module not in self.scaled:
            return {name: tensor.to(self._type(tensor))}
        scale = (tensor.abs().max() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        return {name: (tensor / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale}


def _groups(keys: Iterable[str], names: Names) -> Iterator[list[str]]:
    """Keys of diffusers' layout that become one tensor of the authors' layout, in the order of their first one."""
    home = authors_home(names)
    found: dict[str, list[str]] = {}
    for key in keys:
        module, _, part = key.rpartition(".")
        found.setdefault(f"{home(module)[0]}.{part}", []).append(key)
    yield from found.values()
