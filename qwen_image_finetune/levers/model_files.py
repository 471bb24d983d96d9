"""A model in diffusers layout or one file: its class, the model without weights, and its tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.levers.gguf_file import GgufTensors
from qwen_image_finetune.levers.single_file import SingleFile
from qwen_image_finetune.levers.stored_precision import GGUF, tensor_index


class Checkpoint:
    """Tensors of a model, read one by one. `unread` are those nobody has asked for yet."""

    def __init__(self, source: Path | SingleFile, stack: ExitStack) -> None:
        self.source = source.path if isinstance(source, SingleFile) else source
        self.tensors = source.tensors() if isinstance(source, SingleFile) else tensor_index(source)
        files = {entry.file for entry in self.tensors.values()}
        self._open: dict[Path, Any] = {
            path: GgufTensors(path) if path.suffix == GGUF else stack.enter_context(safe_open(path, framework="pt"))
            for path in files
        }
        self.unread = dict.fromkeys(self.tensors)

    def read(self, key: str) -> Tensor:
        """The tensor as stored (of GGUF's blocks, as numbers), maybe a view of the file; copy what is kept."""
        self.unread.pop(key, None)
        entry = self.tensors[key]
        file, name = self._open[entry.file], entry.key or key
        if not entry.rows:
            return cast(Tensor, file.get_tensor(name))
        stored = file.get_slice(name)
        parts = [stored[begin:end] for begin, end in entry.rows]
        if len(parts) == 1:
            return cast(Tensor, parts[0])
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


@contextmanager
def opened(source: Path | SingleFile) -> Iterator[Checkpoint]:
    """The tensors of a model's folder in diffusers layout, or of one file, while the context lasts.

    Raises:
        ConfigError: files are missing or broken.
    """
    with ExitStack() as stack:
        yield Checkpoint(source, stack)


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
