"""LoRA files as every verb reads them: in whatever dialect, each key at its place or the file refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qwen_image_finetune.lora.dialects import read_state
from qwen_image_finetune.lora.header import LoraFileError, declared_alpha, read_metadata
from qwen_image_finetune.lora.layers import Changed
from qwen_image_finetune.lora.names import Naming, Places
from qwen_image_finetune.lora.targets import linear_modules


@dataclass(frozen=True)
class LoraFile:
    """What a file holds."""

    path: Path
    layers: dict[str, Changed]  # by diffusers module name
    metadata: dict[str, str]
    without_alpha: int = 0  # modules, as the file names them, whose alpha is written nowhere

    @property
    def notes(self) -> list[str]:
        """What was assumed about it, for whoever uses it."""
        if not self.without_alpha:
            return []
        return [
            f"{self.path}: the alpha of {self.without_alpha} layers is written neither beside the weights nor in "
            "metadata or adapter_config.json; it is taken for the rank, a scale of 1, as diffusers and ComfyUI take it"
        ]


def read_lora(path: Path, naming: Naming, modules: Iterable[str] | None = None) -> LoraFile:
    """The layers and metadata of a LoRA file in any dialect.

    Args:
        naming: of the model that the file is for (`Family.naming`).
        modules: names of its linear layers; None are those of the published models.

    Raises:
        LoraFileError: the file is broken, of another kind or another model; a number in it is not finite.
    """
    metadata = read_metadata(path)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise LoraFileError(f"{path} cannot be read: {error}; download or save it again") from error
    xlabs = any(".processor." in key for key in state)  # their dialect, which diffusers knows for some models
    if xlabs and issubclass(naming.pipeline, LoraBaseMixin):
        state = naming.pipeline.lora_state_dict(dict(state))
    places = Places(naming.modules if modules is None else modules, naming.native)
    layers, without_alpha = read_state(state, places, naming.native, declared_alpha(metadata, path), path)
    if not layers:
        raise LoraFileError(f"{path} holds no LoRA layers")
    return LoraFile(path, layers, metadata, len(without_alpha))


def read_fitting(transformer: nn.Module, path: Path, naming: Naming) -> LoraFile:
    """The same for a transformer, of which shapes are enough.

    Raises:
        LoraFileError: as there, or a layer is of another size.
    """
    linear = linear_modules(transformer)
    file = read_lora(path, naming, linear)
    for name, layer in file.layers.items():
        weight_shape = (cast(Any, linear[name]).out_features, cast(Any, linear[name]).in_features)
        outputs, inputs = layer.shape
        if inputs != weight_shape[1] or outputs not in (weight_shape[0], None):
            raise LoraFileError(
                f"{path}: {name} is {weight_shape[0]} x {weight_shape[1]} in this transformer and "
                f"{weight_shape[0] if outputs is None else outputs} x {inputs} in the file: "
                "it was trained on another model"
            )
    return file
