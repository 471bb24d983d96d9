"""`qif lora extract`: the LoRA nearest to what a full fine-tune changed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.command.lora.base import base_of, number
from qwen_image_finetune.command.lora.files import check_place
from qwen_image_finetune.command.lora.reshape import left_out
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.levers import model_files
from qwen_image_finetune.levers.single_file import SingleFile
from qwen_image_finetune.lora.export import Dialect, write_checked
from qwen_image_finetune.lora.factoring import Factored, extracted
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.lora.sources import TRANSFORMER, find_tuned
from qwen_image_finetune.lora.targets import linear_modules


def extract(
    tuned: Path,
    base: str,
    output: Path,
    rank: int | None,
    energy: float | None,
    dialect: Dialect,
    overwrite: bool,
) -> list[str]:
    """Write the difference between two transformers as a LoRA, weight by weight: memory of one weight and its factors.

    Args:
        tuned: checkpoint or version folder of a full fine-tune, a folder in diffusers layout, or one file.
        base: checkpoint that it began from.

    Returns:
        What the LoRA lacks, and which programs read it.

    Raises:
        ConfigError, LoraFileError: one of them cannot be read, they are of two models, or nothing differs.
        OutputError: the output may not be written.
    """
    if rank is None and energy is None:
        raise LoraFileError("how large? Give --rank, --energy or both")
    check_place(output, overwrite)
    folder, family = base_of(base)
    linear = linear_modules(loading.empty_transformer(family, folder, torch.bfloat16))
    made: dict[str, Factored] = {}
    others: dict[str, float] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with model_files.opened(folder / TRANSFORMER) as before, model_files.opened(_source(tuned, family)) as after:
        if lacking := sorted(set(before.tensors) ^ set(after.tensors)):
            raise LoraFileError(
                f"{tuned} and {folder} are of two models: only one of them has {', '.join(lacking[:3])}"
            )
        for key, entry in before.tensors.items():
            if entry.shape != after.tensors[key].shape:
                raise LoraFileError(f"{tuned}: {key} is {after.tensors[key].shape}, {entry.shape} in {folder}")
            original = number(before, key)
            change = number(after, key) - original
            module, _, part = key.rpartition(".")
            if not change.any():
                continue
            if part == "weight" and module in linear:
                made[module] = extracted(change.to(device), rank, energy)
            else:
                others[key] = _share(change, original)
    if not made:
        raise LoraFileError(f"{tuned}: no weight of a linear layer differs from {folder}")
    metadata = {"qif.family": family.name, "ss_base_model_version": folder.name}
    layers = {name: factored.layer for name, factored in made.items()}
    words = write_checked(layers, output, dialect, family.naming, metadata)
    if others:
        most = max(others, key=lambda key: others[key])
        words.insert(0, f"no LoRA can hold the change of {len(others)} biases, norms and the like; most of it is "
                        f"{others[most]:.2%} of {most}")  # fmt: skip
    return [f"{len(made)} layers", *left_out(made), *words]


def _source(tuned: Path, family: Family) -> Path | SingleFile:
    """Where the tensors of the tuned transformer are."""
    path = tuned.expanduser()
    if path.is_file():
        return SingleFile(path, family.file_names)
    found = find_tuned(path)
    if found is not None:
        return found / TRANSFORMER
    return path / TRANSFORMER if (path / TRANSFORMER).is_dir() else path


def _share(change: Tensor, original: Tensor) -> float:
    return float(change.norm() / original.norm().clamp(min=torch.finfo(torch.float32).tiny))
