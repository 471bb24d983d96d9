"""Pipelines that diffusers has as modular blocks alone, loaded and saved as its ordinary pipelines are.

The index of a modular checkpoint may name any class for a part, and any place on the hub. Neither is taken from it:
classes are those that diffusers' own blocks ask for, and parts lie in the checkpoint's folder, each under its name. No
code of a checkpoint is looked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.modular_pipelines import ModularPipeline
from huggingface_hub import snapshot_download
from torch import nn

from qwen_image_finetune.disk.files import Staged, write_atomic
from qwen_image_finetune.families.base import quiet

FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # of a part, as it is downloaded


class OneFolder(ModularPipeline):
    """A modular pipeline whose parts lie in one folder. Mixed into the class of diffusers that a checkpoint names."""

    left_out: ClassVar[tuple[str, ...]] = ()  # blocks that do not run, and whose parts are not loaded

    @classmethod
    def empty(cls) -> Any:
        """The pipeline with no parts but those that diffusers makes from constants of its blocks."""
        blocks = getattr(diffusers, cls.default_blocks_name)()
        for name in cls.left_out:
            blocks.sub_blocks.pop(name)
        with quiet("diffusers.guiders.guider_utils"):  # that guiders are new to diffusers
            return cls(blocks=blocks)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        use_safetensors: bool = True,
        local_files_only: bool = True,
        **absent: None,
    ) -> Any:
        """The pipeline of a checkpoint.

        Args:
            dtype: of its models; None is that of the files.
            absent: names of parts that are not loaded.

        Raises:
            OSError: a part is not there.
        """
        pipe, folder = cls.empty(), Path(folder)
        index = json.loads((folder / cls.config_name).read_text(encoding="utf-8"))
        made = set(pipe.config_component_names)  # of constants, unless the checkpoint has them
        parts = {}
        for name, spec in pipe._component_specs.items():
            if name in absent or (name in made and name not in index):
                continue
            if not (folder / name).is_dir():
                raise OSError(f"{name} is not in it{_elsewhere(index.get(name))}")
            options: dict[str, Any] = {"local_files_only": True}
            if issubclass(spec.type_hint, nn.Module):
                options |= {"use_safetensors": use_safetensors} | ({} if dtype is None else {"dtype": dtype})
            elif not issubclass(spec.type_hint, diffusers.ConfigMixin):
                options |= {"trust_remote_code": False}
            parts[name] = spec.type_hint.from_pretrained(str(folder / name), **options)
        pipe.register_components(**parts)
        pipe.register_to_config(_name_or_path=str(folder))
        return pipe

    @classmethod
    def download(cls, name: str, revision: str | None = None, use_safetensors: bool = True, **absent: None) -> str:
        """The folder in the hub's cache into which a checkpoint's index and parts are downloaded.

        Args:
            absent: names of parts that are not.
        """
        parts = [part for part in cls.empty().component_names if part not in absent]
        wanted = [f"{part}/{files}" for part in parts for files in FILES]
        return snapshot_download(name, revision=revision, allow_patterns=[cls.config_name, *wanted])

    def save_pretrained(self, folder: Staged, safe_serialization: bool = True) -> None:
        """Write index and parts. The index says where none of them lies but by its name: a folder may be moved."""
        super().save_pretrained(f"{folder}", safe_serialization=safe_serialization, overwrite_modular_index=True)
        file = folder / self.config_name
        index = json.loads(file.read_text(encoding="utf-8"))
        for entry in index.values():
            if isinstance(entry, list):
                entry[-1]["pretrained_model_name_or_path"] = None
        write_atomic(file, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _elsewhere(entry: Any) -> str:
    """Where an index says that a part lies."""
    source = entry[-1].get("pretrained_model_name_or_path") if isinstance(entry, list) and entry else None
    place = "" if source is None else f"/{entry[-1].get('subfolder') or ''}".rstrip("/")
    return "" if source is None else f", its index takes that from {source}{place}: put it there, under this name"
