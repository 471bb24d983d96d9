"""A transformer in one file, as people have them beside ComfyUI, read as tensors of diffusers' layout.

Nothing is converted in memory: each tensor of diffusers' layout is some rows of one tensor of the file, and is read
when it is its turn, in the precision in which it is stored. Scales follow the rows they belong to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.levers.stored_precision import FP8_SCALES, GGUF, PACKED, StoredTensor, header
from qwen_image_finetune.lora.names import Names, Native, numbered

# What stands before every name, by the program that wrote the file.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
# Models that lie beside the transformer in files with everything in one; ours come from the folder.
OTHER_MODELS = (
    "vae.", "first_stage_model.", "text_encoders.", "text_encoder.", "text_encoder_2.", "cond_stage_model.",
    "conditioner.",
)  # fmt: skip
# ComfyUI's words for the format of a layer: beside its weight, and those of all layers in the header.
LAYER_FORMAT, ALL_FORMATS = "comfy_quant", "_quantization_metadata"
E4M3 = "float8_e4m3fn"
OF_ANOTHER = "it is of another model than model.pretrained_model_name_or_path, or not whole"


@dataclass(frozen=True)
class SingleFile:
    """A .safetensors or .gguf with the weights of one transformer."""

    path: Path
    names: Names = field(default_factory=dict)  # the authors', of modules that diffusers calls otherwise

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor under diffusers' name for it.

        Raises:
            ConfigError: the file is broken, its weights are in a format that is not known here, or two of its tensors
                have the same place.
        """
        found = header(self.path)
        _check_formats(self.path, found)
        prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in found)), "")
        tensors: dict[str, StoredTensor] = {}
        for key, entry in found.items():
            if prefix and key.startswith(OTHER_MODELS):
                continue
            for name, part in self._parts(key.removeprefix(prefix), replace(entry, key=key)):
                if name in tensors:
                    raise ConfigError(f"{self.path}: {key} and {tensors[name].key} are both {name}")
                tensors[name] = part
        return tensors

    def _parts(self, name: str, entry: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
        """diffusers' tensors in one of the file."""
        module, _, ending = name.rpartition(".")
        template, number = numbered(module.partition(".weight")[0] if PACKED in name else module)
        native = self.names.get(template)
        if native is None:
            yield name, entry
            return
        if PACKED in name:
            raise ConfigError(
                f"{self.path}: {name} is in 4 bits under the authors' names, whose matrices of several layers cannot "
                "be taken apart; name a file in full precision or fp8"
            )
        modules = [module.replace("{}", number) for module in native.modules]
        ending = "weight" if ending == native.weight else ending
        by_row = ending in ("weight", "bias") or (ending in FP8_SCALES and math.prod(entry.shape) > 1)
        rows = _rows(native, entry, self.path) if by_row else [()] * len(modules)
        for one, part in zip(modules, rows, strict=True):
            shape = (sum(end - begin for begin, end in part), *entry.shape[1:]) if part else entry.shape
            yield f"{one}.{ending}", replace(entry, rows=part, shape=shape)


def _rows(native: Native, entry: StoredTensor, path: Path) -> list[tuple[tuple[int, int], ...]]:
    """The rows of each module in a tensor of the authors; () are all."""
    height = entry.shape[0] if entry.shape else 0
    if native.halves_swapped:
        return [((height // 2, height), (0, height // 2))]
    if len(native.modules) == 1:
        return [()]
    unit, rest = divmod(height, sum(native.rows))
    if rest:
        raise ConfigError(
            f"{path}: {entry.key} is {entry.shape}, which its {len(native.modules)} layers cannot share: {OF_ANOTHER}"
        )
    begins = [unit * sum(native.rows[:place]) for place in range(len(native.rows) + 1)]
    return [((begin, end),) for begin, end in pairwise(begins)]


def _check_formats(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Refuse layers in a format of ComfyUI that is not known here: their numbers would be read as others."""
    if path.suffix == GGUF:
        return
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        try:
            listed = json.loads((file.metadata() or {}).get(ALL_FORMATS) or "{}").get("layers") or {}
            formats = {layer: about["format"] for layer, about in listed.items()}
            for key in tensors:
                if key.endswith(f".{LAYER_FORMAT}"):
                    formats[key.rpartition(".")[0]] = json.loads(bytes(file.get_tensor(key)))["format"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: what it says about the formats of its layers is broken: {error!r}") from error
    for layer, format in formats.items():
        if format != E4M3:
            raise ConfigError(
                f"{path}: {layer} is in ComfyUI's {format!r}, which is not read here; known are {E4M3}, bf16, fp16 "
                "and fp32"
            )
