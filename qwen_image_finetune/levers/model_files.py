"""A model folder in diffusers layout: its class, the model without weights, and its tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.levers.stored_precision import tensor_index


class Checkpoint:
    """Tensors of a model folder, read one by one. `unread` are those nobody has asked for yet."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.tensors = folder, tensor_index(folder)
        files = {entry.file for entry in self.tensors.values()}
        self._open = {path: stack.enter_context(safe_open(path, framework="pt")) for path in files}
        self.unread = dict.fromkeys(self.tensors)

    def read(self, key: str) -> Tensor:
        """The tensor as stored, a view of the file; copy what is kept."""
        self.unread.pop(key, None)
        return cast(Tensor, self._open[self.tensors[key].file].get_tensor(key))


@contextmanager
def opened(folder: Path) -> Iterator[Checkpoint]:
    """The tensors of a model folder, while the context lasts.

    Raises:
        ConfigError: files are missing or broken.
    """
    with ExitStack() as stack:
        yield Checkpoint(folder, stack)


def model_class(folder: Path) -> type[nn.Module]:
    """The class that config.json names.

    Raises:
        ConfigError: diffusers has no such model.
    """
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ConfigError(
            f"{folder / 'config.json'}: {name!r} is no model of the installed diffusers; upgrade diffusers"
        )
    return found


def skeleton(cls: type[nn.Module], folder: Path) -> nn.Module:
    """The model without weights: its parameters have shapes and no memory, its buffers are there."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    with init_empty_weights():
        model: nn.Module = cast(Any, cls).from_config(config)
    return model.requires_grad_(False).eval()
