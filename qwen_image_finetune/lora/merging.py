"""LoRAs under the training: what they add to the weights of a base that is then frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qwen_image_finetune.config import BaseLora
from qwen_image_finetune.lora.names import Naming
from qwen_image_finetune.lora.reading import LoraFile, read_fitting
from qwen_image_finetune.lora.sources import find_lora


@dataclass(frozen=True)
class Change:
    """LoRA files, each with its strength."""

    files: tuple[tuple[LoraFile, float], ...]

    def touches(self, module: str) -> bool:
        """Whether the weight of a linear layer changes."""
        return any(module in file.layers for file, _ in self.files)

    def added_to(self, module: str, weight: Tensor, first_row: int = 0) -> Tensor:
        """float32: a weight (out, in), or rows of it, with the changes of all files, W + sum strength (W' - W).

        Args:
            first_row: which row of the layer the first one of `weight` is.
        """
        original = weight.float()
        changed = original.clone()
        for file, strength in self.files:
            layer = file.layers.get(module)
            if layer is not None:
                changed += strength * layer.change(original, first_row)
        return changed

    def words(self) -> list[str]:
        """A line for each file."""
        return [
            f"merged into the base: {file.path} at strength {strength:g}, {len(file.layers)} layers"
            for file, strength in self.files
        ]


def read_change(transformer: nn.Module, loras: Sequence[BaseLora], naming: Naming) -> Change | None:
    """The LoRAs of model.base_loras, read for a transformer of which shapes are enough; None without any.

    Raises:
        LoraFileError: one is not there, broken, or does not fit.
    """
    return read_change_of(transformer, [(one.file, one.strength) for one in loras], naming) if loras else None


def read_change_of(transformer: nn.Module, loras: Iterable[tuple[str | Path, float]], naming: Naming) -> Change:
    """The same of files and their strengths."""
    return Change(tuple((read_fitting(transformer, find_lora(file), naming), strength) for file, strength in loras))
