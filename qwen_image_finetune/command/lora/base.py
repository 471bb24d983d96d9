"""The checkpoint that a LoRA is merged into or taken from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.config import ConfigError, ModelConfig
from qwen_image_finetune.config.registry import family_of_pipeline
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.levers.model_files import Checkpoint
from qwen_image_finetune.levers.stored_precision import FP8_SCALES, local_checkpoint

NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def base_of(name: str) -> tuple[Path, Family]:
    """Folder and family of a checkpoint in diffusers layout, by its folder or its hub id.

    Raises:
        ConfigError: it is not on this machine, or of no family.
    """
    folder = local_checkpoint(ModelConfig(pretrained_model_name_or_path=name))
    if folder is None:
        raise ConfigError(f"{name} is no folder, and not in the hub's cache: fetch it with `hf download {name}`")
    pipeline = str(loading.pipeline_config(folder).get("_class_name"))
    family = family_of_pipeline(pipeline)
    if family is None:
        raise ConfigError(f"{folder} is a {pipeline}, which is of no family here")
    return folder, get_family(family)


def number(checkpoint: Checkpoint, key: str) -> Tensor:
    """float32: a tensor of a checkpoint as the numbers it stands for, with the scales of fp8.

    Raises:
        ConfigError: it is packed in four or eight bits by bitsandbytes.
    """
    entry = checkpoint.tensors[key]
    if entry.dtype not in NUMBERS:
        raise ConfigError(f"{entry.file}: {key} is packed ({entry.dtype}): name the checkpoint in bf16 it was made of")
    tensor = checkpoint.read(key).float()
    module, _, part = key.rpartition(".")
    for scale in FP8_SCALES:
        if part == "weight" and (beside := f"{module}.{scale}") in checkpoint.tensors:
            tensor = tensor * checkpoint.read(beside).float().reshape(-1, *[1] * (tensor.ndim - 1))
    return tensor
