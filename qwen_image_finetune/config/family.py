"""What `model.pretrained_model_name_or_path` and `train.trainer` may say, and which family they mean."""

from __future__ import annotations

import difflib
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qwen_image_finetune.config.registry import (
    DEFAULT_FAMILY,
    FAMILIES,
    INDEX_FILES,
    REFUSED,
    family_of_pipeline,
    index_of,
)
from qwen_image_finetune.config.root import Config
from qwen_image_finetune.config.tree import shown
from qwen_image_finetune.config.values import ConfigError
from qwen_image_finetune.config.words import no_folder

MODEL = "model.pretrained_model_name_or_path"
TRANSFORMER_FILES = (".safetensors", ".gguf")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # OWNER/NAME: a place to send to, where a short name will not do
EXAMPLES = {entry.example for entry in FAMILIES.values()}
SUGGESTION = f"use a pipeline in diffusers layout, such as {FAMILIES[DEFAULT_FAMILY].example}"


def model_problems(name: Any) -> list[str]:
    """Why `name` cannot be a checkpoint to train, without loading or downloading anything; empty if it may be one."""
    if not isinstance(name, str) or not name:
        return []  # the schema says so
    try:
        folder = Path(name).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, or the home of nobody
        return [f"{MODEL}={shown(name)} is no path: {error}"]
    if folder.is_dir():
        return _folder_problems(name, folder)
    if exists:
        takes = f"{MODEL}={name!r} is a file; it takes a hub id or a folder in diffusers layout"
        if folder.suffix in TRANSFORMER_FILES:
            takes += (
                f". Write model.transformer_file={name} for a file with the transformer, and here the model that it is "
                f"of, such as {FAMILIES[DEFAULT_FAMILY].example}, for encoders, VAE and scheduler"
            )
        return [takes]
    if name.startswith(("/", "./", "../", "~")) or name in (".", ".."):
        return [f"{MODEL}={name!r}: {no_folder(folder)}"]
    if not HUB_ID.fullmatch(name):
        return [f"{MODEL}={name!r} is neither an existing folder nor a hub id (owner/name): {no_folder(folder)}"]
    if len(folder.parts) > 1 and Path(folder.parts[0]).is_dir() and name not in EXAMPLES:
        # A mistyped path reads like a hub id, and would be looked for there for minutes.
        return [f"{MODEL}={name!r}: {no_folder(folder)} (if a hub id is meant, {folder.parts[0]} must not be here)"]
    if fnmatchcase(name.lower(), "qwen/qwen*-vl*"):
        return [f"{MODEL}={name!r} is a language model, not an image model; {SUGGESTION}"]
    return []


def file_problems(name: Any) -> list[str]:
    """Why `name` cannot be model.transformer_file, without opening it; empty if it may be."""
    if not isinstance(name, str) or not name:
        return []
    key = f"model.transformer_file={name!r}"
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:
        return [f"{key} is no path: {error}"]
    if path.suffix not in TRANSFORMER_FILES:
        return [f"{key}: it takes one file that ends in {' or '.join(TRANSFORMER_FILES)}"]
    if is_folder:
        return [f"{key} is a folder; it takes one file with the transformer"]
    return [] if is_file else [f"{key}: not in {path.absolute().parent}"]


def _folder_problems(name: str, folder: Path) -> list[str]:
    if index_of(folder) is not None:
        return []
    if (folder / "config.json").is_file():
        kind = _read_json(folder / "config.json").get("model_type", "of unknown type")
        return [f"{MODEL}={name!r} holds one model (model_type {kind!r}), not a pipeline; {SUGGESTION}"]
    return [f"{MODEL}={name!r} has no model_index.json, so it is not in diffusers layout; {SUGGESTION}"]


def trainer_problems(name: Any) -> list[str]:
    """Why `name` is no value of train.trainer; empty if it is one."""
    if not isinstance(name, str) or name in FAMILIES:
        return []
    by_lower_case = {family.lower(): family for family in FAMILIES}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    question = f"; did you mean {by_lower_case[close[0]]!r}?" if close else ""
    return [f"train.trainer={name!r} is not one of {sorted(FAMILIES)}{question}"]


def resolve_family(config: Config, download: bool = False) -> tuple[str, str]:
    """The family of the configured checkpoint, and where that was learnt from.

    A local folder or the local Hugging Face cache is asked first, then the hub if `download` allows it; where the
    checkpoint cannot be reached, train.trainer decides, and without it the default family is assumed.

    Raises:
        ConfigError: the checkpoint's pipeline is not supported, or is another one than train.trainer says.
    """
    trainer = config.train.trainer
    index, source = _find_model_index(config, download)
    if index is None:
        if trainer is not None:
            return trainer, "train.trainer"
        return DEFAULT_FAMILY, "assumed (checkpoint cannot be reached)"
    pipeline = _read_json(index).get("_class_name")
    family = family_of_pipeline(pipeline) if isinstance(pipeline, str) else None
    name = config.model.pretrained_model_name_or_path
    if isinstance(pipeline, str) and pipeline in REFUSED:
        raise ConfigError(f"{MODEL}={name!r} is a {pipeline}, which cannot be trained here: {REFUSED[pipeline]}")
    if family is None:
        supported = ", ".join(f"{entry.pipeline} (such as {entry.example})" for entry in FAMILIES.values())
        raise ConfigError(f"{MODEL}={name!r} is a {pipeline}, which cannot be trained here; supported are {supported}")
    if trainer not in (None, family):
        raise ConfigError(
            f"train.trainer={trainer!r} disagrees with {MODEL}={name!r}, which is a {pipeline}: "
            f"set train.trainer={family}, leave it out, or name another model"
        )
    return family, source


def _find_model_index(config: Config, download: bool) -> tuple[Path | None, str]:
    """Path of the checkpoint's index, None where it cannot be reached, and where it is from."""
    name, revision = config.model.pretrained_model_name_or_path, config.model.revision
    if (folder := Path(name).expanduser()).is_dir():
        index = index_of(folder) or folder / INDEX_FILES[0]
        return index, f"{index.name} of {name}"

    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for file in INDEX_FILES:
        cached = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached), "hub cache"
    if not download:
        return None, ""

    def fetched(file: str) -> tuple[Path, str]:
        return Path(hf_hub_download(name, file, revision=revision)), "hub"

    try:
        try:
            return fetched(INDEX_FILES[0])
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:  # a pipeline of modular blocks, if any
            return fetched(INDEX_FILES[1])
    except LocalEntryNotFoundError:  # no network, or HF_HUB_OFFLINE
        return None, ""
    except GatedRepoError as error:
        raise ConfigError(
            f"{MODEL}={name!r} is gated: accept its licence on the hub and log in (hf auth login)"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"{MODEL}={name!r} (revision {revision or 'main'}) is not on the hub, or is private"
        ) from error
    except EntryNotFoundError as error:
        raise ConfigError(
            f"{MODEL}={name!r} has no model_index.json: it is no diffusers pipeline; {SUGGESTION}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content
