"""The registry of model families, the values of train.trainer: adding one is a file in families/ and a line here.

It is a plain table on the ground floor, because configurations are checked against it before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

INDEX_FILES = ("model_index.json", "modular_model_index.json")  # of a checkpoint's folder; one of them is there


@dataclass(frozen=True)
class Entry:
    """Where a family lives and how its checkpoints are recognised."""

    module: str  # file in qwen_image_finetune/families
    class_name: str
    pipeline: str  # `_class_name` in the checkpoint's index
    example: str  # a hub id, for messages
    loads_loras: bool = True  # the pipeline has a `load_lora_weights` in diffusers
    modular: bool = False  # diffusers has the pipeline as modular blocks alone


FAMILIES: dict[str, Entry] = {
    "FluxKontext": Entry(
        "flux_kontext", "FluxKontext", "FluxKontextPipeline", "black-forest-labs/FLUX.1-Kontext-dev"
    ),
    "QwenImageEdit": Entry(
        "qwen_image_edit", "QwenImageEdit", "QwenImageEditPipeline", "Qwen/Qwen-Image-Edit"
    ),
    "QwenImageEditPlus": Entry(
        "qwen_image_edit_plus", "QwenImageEditPlus", "QwenImageEditPlusPipeline", "Qwen/Qwen-Image-Edit-2509"
    ),
    "Flux2Klein": Entry(
        "flux2_klein", "Flux2Klein", "Flux2KleinPipeline", "black-forest-labs/FLUX.2-klein-base-4B"
    ),
    "Flux2": Entry(
        "flux2", "Flux2", "Flux2Pipeline", "black-forest-labs/FLUX.2-dev"
    ),
    "QwenImage21": Entry("qwen_image_21", "QwenImage21", "QwenImage21Pipeline", "Qwen/Qwen-Image-2.1"),
    "JoyImageEdit": Entry(
        "joy_image_edit", "JoyImageEdit", "JoyImageEditPipeline", "jdopensource/JoyAI-Image-Edit-Diffusers",
        loads_loras=False,
    ),
    "JoyImageEditPlus": Entry(
        "joy_image_edit_plus", "JoyImageEditPlus", "JoyImageEditPlusPipeline",
        "jdopensource/JoyAI-Image-Edit-Plus-Diffusers", loads_loras=False,
    ),
    "LongCatImageEdit": Entry(
        "longcat_image_edit", "LongCatImageEdit", "LongCatImageEditPipeline", "meituan-longcat/LongCat-Image-Edit",
        loads_loras=False,
    ),
    "Flux": Entry("flux", "Flux", "FluxPipeline", "black-forest-labs/FLUX.1-dev"),
    "QwenImage": Entry("qwen_image", "QwenImage", "QwenImagePipeline", "Qwen/Qwen-Image"),
    "Flux3Klein": Entry(
        "flux3_klein", "Flux3Klein", "Flux3ModularPipeline", "black-forest-labs/flux-3-image-klein-base", modular=True
    ),
}  # fmt: skip

# Pipelines of checkpoints that are near to one of a family and cannot be trained, with the reason.
REFUSED: dict[str, str] = {
    "Flux3DistilledModularPipeline": "it is distilled to 16 steps, each of which it is told the end of; train on its "
    "base, black-forest-labs/flux-3-image-klein-base",
}

DEFAULT_FAMILY = "QwenImageEdit"


def index_of(folder: Path) -> Path | None:
    """The index of a checkpoint's folder, which names its pipeline; None where there is none."""
    return next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)


def family_of_pipeline(pipeline: str) -> str | None:
    """Name of the family whose checkpoints carry this pipeline class, if there is one."""
    return next((name for name, entry in FAMILIES.items() if entry.pipeline == pipeline), None)
