"""The model families by name; `qwen_image_finetune.config.registry` is their list. Nothing heavy is imported here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qwen_image_finetune.config.registry import FAMILIES

if TYPE_CHECKING:
    from qwen_image_finetune.config import Config
    from qwen_image_finetune.families.base import Family

__all__ = ["FAMILIES", "get_family", "with_targets"]


def get_family(name: str) -> Family:
    """The family called `name` (a value of train.trainer); imports its file.

    Raises:
        KeyError: no such family.
    """
    entry = FAMILIES[name]
    module = importlib.import_module(f"qwen_image_finetune.families.{entry.module}")
    family: Family = getattr(module, entry.class_name)()
    return family


def with_targets(config: Config, family: Family) -> Config:
    """The configuration with the family's own targets of a LoRA, where it names none."""
    lora = config.model.lora
    if lora is None or lora.target_modules is not None:
        return config
    targets = family.adapter_targets if isinstance(family.adapter_targets, str) else list(family.adapter_targets)
    named = lora.model_copy(update={"target_modules": targets})
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": named})})
