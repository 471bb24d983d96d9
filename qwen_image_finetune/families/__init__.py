"""The registry of model families. Adding a family is one file and one line here.

This module imports nothing heavy: configurations are checked against it before torch is loaded.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_image_finetune.families.base import Family


@dataclass(frozen=True)
class Entry:
    """Where a family lives and how its checkpoints are recognised."""

    module: str  # file in this folder
    class_name: str
    pipeline: str  # `_class_name` in the checkpoint's model_index.json
    example: str  # a hub id, for messages


FAMILIES: dict[str, Entry] = {
    "FluxKontext": Entry(
        "flux_kontext", "FluxKontext", "FluxKontextPipeline", "black-forest-labs/FLUX.1-Kontext-dev"
    ),
    "QwenImageEdit": Entry(
        "qwen_image_edit", "QwenImageEdit", "QwenImageEditPipeline", "Qwen/Qwen-Image-Edit"
    ),
}  # fmt: skip

DEFAULT_FAMILY = "QwenImageEdit"


def get_family(name: str) -> Family:
    """The family called `name` (a value of train.trainer); imports its file.

    Raises:
        KeyError: no such family.
    """
    entry = FAMILIES[name]
    module = importlib.import_module(f"qwen_image_finetune.families.{entry.module}")
    family: Family = getattr(module, entry.class_name)()
    return family


def family_of_pipeline(pipeline: str) -> str | None:
    """Name of the family whose checkpoints carry this pipeline class, if there is one."""
    return next((name for name, entry in FAMILIES.items() if entry.pipeline == pipeline), None)
