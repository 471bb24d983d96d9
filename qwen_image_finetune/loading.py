"""Pretrained parts: where they lie, and loading them one by one. Safetensors only; no code from a hub runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import nn
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from qwen_image_finetune.config import Config, ConfigError, ModelConfig
from qwen_image_finetune.config.registry import INDEX_FILES, family_of_pipeline, index_of
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.families.modular import OneFolder
from qwen_image_finetune.levers import weights
from qwen_image_finetune.levers.model_files import skeleton
from qwen_image_finetune.levers.quantize import quantize_text_encoder
from qwen_image_finetune.levers.single_file import SingleFile
from qwen_image_finetune.levers.stored_precision import GGUF, base_precision, refuse_scaled_fp8
from qwen_image_finetune.lora.merging import Change, read_change

# Their bars say little about weights that load in seconds, and break into ours.
disable_diffusers_bars()
disable_transformers_bars()

PRECISION = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """Precision of frozen weights and of the forward pass."""
    return PRECISION[mixed_precision]


def encoder_dtype(mixed_precision: str) -> torch.dtype:
    """Precision of the encoders and the cache: never fp16, whose range T5 and Qwen-VL states leave (65504)."""
    return torch.float32 if mixed_precision == "fp16" else PRECISION[mixed_precision]


def checkpoint_folder(config: Config, family: Family) -> Path:
    """Local folder of the checkpoint; a hub id is downloaded into (or found in) the hub's cache.

    Raises:
        ConfigError: the checkpoint can be found neither here nor there.
    """
    name = config.model.pretrained_model_name_or_path
    folder, revision = Path(name).expanduser(), config.model.revision
    if folder.is_dir():
        return folder
    left_out = {} if config.model.transformer_file is None else {"transformer": None}  # many gigabytes for nothing
    try:
        found = Path(family.pipeline.download(name, revision=revision, use_safetensors=True, **left_out))
        if left_out:
            hf_hub_download(name, "transformer/config.json", revision=revision)
        return found
    except (OSError, ValueError) as error:
        if error.__cause__ is None:  # the hub answered, but not with a pipeline in safetensors; or the disk is full
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"model.pretrained_model_name_or_path={name!r} cannot be downloaded: {reason}") from error
        raise ConfigError(
            f"model.pretrained_model_name_or_path={name!r} is no folder in {Path.cwd()}, it is not wholly in the hub's "
            f"cache, and the hub cannot be reached: download it where there is a network (hf download {name}; a gated "
            "model wants HF_TOKEN or hf auth login), or give the path of a folder in diffusers layout"
        ) from error


def load_encoders(
    family: Family,
    folder: Path,
    dtype: torch.dtype,
    devices: Mapping[str, torch.device | str],
    *,
    text: bool = True,
    vae: bool = True,
    text_format: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> DiffusionPipeline:
    """The family's pipeline without its transformer; text encoders or VAE are left out on request.

    Args:
        devices: where each component goes, by its name in the pipeline; "default" for the others.
        text_format: in which the text encoders' blocks are stored, fp8 or int8; None: as the checkpoint is.
        say: hears what became of the text encoders.

    Raises:
        ConfigError: a part is stored in a precision that its library would read wrongly, cannot be read, or is not of
            diffusers or transformers.
    """
    absent = {"transformer"} | (set() if vae else {"vae"})
    if not text:
        absent |= set(family.text_components) - set(family.always_loaded)
    for part in sorted({"vae", *family.text_components} - absent):
        refuse_scaled_fp8(folder / part)
    check_components(folder)
    with readable(folder):
        pipe = family.pipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **dict.fromkeys(absent)
        )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            home = devices.get(name) or devices["default"]
            if text_format is not None and name in family.text_components:
                say(quantize_text_encoder(part, text_format, home).words(name))
            part.requires_grad_(False).eval().to(home)
    return pipe


def load_tokenizers(family: Family, folder: Path) -> DiffusionPipeline:
    """The family's pipeline with what turns prompts and pictures into the text encoders' input, and no weights.

    Raises:
        ConfigError: as `load_encoders`.
    """
    check_components(folder)
    weights_of = [name for name in family.text_components if name.startswith("text_encoder")]
    with readable(folder):
        return family.pipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **dict.fromkeys(["transformer", "vae", *weights_of])
        )


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Around loading from `folder`: what the libraries raise on missing or broken files, as one message.

    Raises:
        ConfigError: in place of their errors.
    """
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model.pretrained_model_name_or_path: {folder} cannot be loaded: {reason} (only safetensors are read, and "
            "no code of a checkpoint runs)"
        ) from error


def pipeline_config(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint."""
    index = index_of(folder) or folder / INDEX_FILES[0]
    about: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    return about


def transformer_config(folder: Path) -> dict[str, Any]:
    """config.json of the transformer of a checkpoint."""
    about: dict[str, Any] = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    return about


def check_components(folder: Path) -> None:
    """Refuse a pipeline with parts of other packages: diffusers would import whatever module an index names.

    Raises:
        ConfigError: names the part.
    """
    for name, component in pipeline_config(folder).items():
        if not isinstance(component, list) or not component:
            continue
        named = [component[0]]
        if isinstance(
            component[-1], dict
        ):  # of modular blocks: the class that is asked for, and the one that was saved
            named += [(component[-1].get("type_hint") or [None])[0]]
        for library in named:
            if library not in ("diffusers", "transformers", None):
                raise ConfigError(
                    f"model.pretrained_model_name_or_path: {index_of(folder)} takes {name} from {library!r}; parts of "
                    "diffusers and transformers are loaded, no other code runs"
                )


def load_transformer(
    family: Family,
    folder: Path,
    dtype: torch.dtype,
    model: ModelConfig | None = None,
    device: torch.device | str = "cpu",
    blocks_to_swap: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> ModelMixin:
    """The transformer, frozen, in its final precision: what is not quantised is in `dtype`.

    Args:
        model: asks for quantisation; None keeps the precision of the checkpoint.
        device: each weight goes there as it is read, so that the host never holds the model.
        blocks_to_swap: that many blocks, those that `levers.swap` will choose, stay in host memory instead.
        say: hears what was quantised, and what did not fit.

    Raises:
        ConfigError: see `check_known`; or its weights are quantised in a way that is unknown or contradicts `model`, or
            do not fit its configuration.
    """
    place = folder / "transformer"
    check_known(family, place)
    change = base_change(family, folder, model)
    with readable(place):
        precision, file = base_precision(place, model), transformer_file(family, model)
        transformer, report = weights.load(
            family.transformer, place, precision, dtype, device, blocks_to_swap, file, change
        )
    for line in [] if change is None else change.words():
        say(line)
    if report is not None:
        say(report.words())
    return cast(ModelMixin, transformer)


def transformer_file(family: Family, model: ModelConfig | None) -> SingleFile | None:
    """What model.transformer_file names, None where the folder has the weights.

    Raises:
        ConfigError: it is of a kind that is not read for this family.
    """
    path = None if model is None else model.transformer_path
    if path is None:
        return None
    if path.suffix == GGUF and not issubclass(family.transformer, FromOriginalModelMixin):
        raise ConfigError(
            f"model.transformer_file={str(path)!r}: diffusers reads no GGUF of a {family.transformer.__name__}; "
            "name a .safetensors"
        )
    return SingleFile(path, family.file_names)


def base_change(family: Family, folder: Path, model: ModelConfig | None) -> Change | None:
    """What model.base_loras add to the transformer of a checkpoint.

    Raises:
        ConfigError, LoraFileError: one of them is not there, broken, or does not fit.
    """
    if model is None or not model.base_loras:
        return None
    return read_change(empty_transformer(family, folder, torch.bfloat16), model.base_loras, family.naming)


def check_base(family: Family, folder: Path, model: ModelConfig) -> ModelMixin:
    """Refuse a base that `load_transformer` would, by headers and LoRA files alone; returns it without memory.

    Raises:
        ConfigError, LoraFileError: as there.
    """
    transformer = empty_transformer(family, folder, torch.bfloat16)
    base_precision(folder / "transformer", model)
    weights.check_tensors(transformer, transformer_file(family, model) or folder / "transformer")
    read_change(transformer, model.base_loras, family.naming)
    return transformer


def check_known(family: Family, place: Path) -> None:
    """Refuse a transformer's folder whose configuration has keys that the installed diffusers does not know: ignoring
    one would train another model than the one the checkpoint describes. So too one that the family cannot train.

    Raises:
        ConfigError: names them.
    """
    config = json.loads((place / "config.json").read_text())
    known = set(inspect.signature(family.transformer.__init__).parameters)
    unknown = sorted(key for key in config if not key.startswith("_") and key not in known | {"quantization_config"})
    if unknown:
        raise ConfigError(
            f"{place / 'config.json'} has keys {unknown} that {family.transformer.__name__} of the "
            "installed diffusers does not know; upgrade diffusers"
        )
    if fault := family.transformer_fault(config):
        raise ConfigError(f"{place / 'config.json'}: {fault}")


def empty_transformer(family: Family, folder: Path, dtype: torch.dtype) -> ModelMixin:
    """The transformer, frozen, its parameters in `dtype` but without memory: for `levers.parallel` to fill.

    Raises:
        ConfigError: see `check_known`.
    """
    check_known(family, folder / "transformer")
    transformer = skeleton(family.transformer, folder / "transformer")
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    stored = transformer.state_dict()
    for name, buffer in transformer.named_buffers():
        if name in stored and buffer.is_floating_point():  # others are computed, and keep their precision
            buffer.data = buffer.data.to(dtype)
    return cast(ModelMixin, transformer)


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The checkpoint's scheduler, whose constants decide the timestep shift; that of its blocks, where it has none."""
    if not (folder / "scheduler").is_dir():
        family = family_of_pipeline(str(pipeline_config(folder).get("_class_name")))
        if family is not None and issubclass(get_family(family).pipeline, OneFolder):
            return get_family(family).pipeline.empty().scheduler
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
