"""Where a LoRA comes from: a file, a folder or the hub. Only safetensors; a pickle can run code when it is opened."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from qwen_image_finetune.disk.history import best_checkpoint
from qwen_image_finetune.disk.versions import LORA_WEIGHTS, VERSION, checkpoint_folders
from qwen_image_finetune.lora.header import PEFT_CONFIG, PEFT_WEIGHTS, LoraFileError

TRANSFORMER = "transformer"  # folder of a fully tuned transformer, in diffusers layout,
TUNED = f"{TRANSFORMER}/config.json"  # and the file that is in every such folder
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def find_lora(source: str | Path) -> Path:
    """The safetensors file that `source` means.

    Args:
        source: a file; a folder with pytorch_lora_weights.safetensors, or with one safetensors file; a version folder,
            for the newest checkpoint in it; OWNER/NAME on the hub, or OWNER/NAME/FILE.safetensors.

    Raises:
        LoraFileError: there is none, or it is not clear which.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in PICKLES:
        raise LoraFileError(
            f"{source} is a pickle, which can execute code when it is opened; only .safetensors is read. "
            "Ask its author for a safetensors file"
        )
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise LoraFileError(f"{source} is not a .safetensors file")
        return path
    if path.is_dir():
        path = newest_with(LORA_WEIGHTS, path) or path
        names = [file.name for file in path.iterdir()]
        if LORA_WEIGHTS not in names:
            _refuse_folders_of_runs(path, names)
        return path / _choose(names, str(source))
    hub = re.fullmatch(r"([\w][\w.-]*/[\w][\w.-]*)(?:/(.+\.safetensors))?", str(source))
    if hub is None:
        raise LoraFileError(
            f"{source} does not exist: give a .safetensors file, a folder with one, or OWNER/NAME on the hub"
        )
    return _download(hub[1], hub[2])


def newest_with(file: str, folder: Path) -> Path | None:
    """`folder` if it holds `file`, else the newest checkpoint in it that does."""
    found = [folder, *reversed(checkpoint_folders(folder))]
    return next((each for each in found if (each / file).is_file()), None)


def find_tuned(source: str | Path) -> Path | None:
    """The checkpoint with a fully tuned transformer that a folder is, or the newest one of a version folder."""
    return newest_with(TUNED, Path(source).expanduser())


def checkpoint_notes(source: str | Path) -> list[str]:
    """Where `source` is a version folder: the checkpoint that stands for it, and the best one if that is another.

    Raises:
        LoraFileError: the folder has neither a LoRA nor a whole transformer.
    """
    version = Path(source).expanduser()
    if not checkpoint_folders(version):
        return []
    taken, best = newest_with(TUNED, version) or find_lora(version).parent, best_checkpoint(version)
    better = f"; the best on held-out pairs is {best}" if best is not None and best != taken and best.is_dir() else ""
    return [f"{source} stands for its newest checkpoint, {taken}{better}"]


def _refuse_folders_of_runs(folder: Path, names: list[str]) -> None:
    """Those without a LoRA: a checkpoint of full fine-tuning has other safetensors, such as its optimizer's state."""
    if (tuned := newest_with(TUNED, folder)) is not None:
        raise LoraFileError(
            f"{folder} is of a full fine-tune, not of a LoRA: {tuned / TRANSFORMER} is the whole transformer, already "
            "a folder as diffusers loads it"
        )
    versions = sorted((name for name in names if VERSION.match(name)), key=lambda name: int(name[1:]))
    if versions and not any(name.endswith(".safetensors") for name in names):
        raise LoraFileError(f"{folder} is the folder of a project: name one of its versions, {', '.join(versions)}")


def _choose(names: list[str], where: str) -> str:
    """The weights among file names: the usual one, or the only one."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    if LORA_WEIGHTS in files:
        return LORA_WEIGHTS
    if len(files) == 1:
        return files[0]
    if files:
        raise LoraFileError(f"{where} has no {LORA_WEIGHTS} but {len(files)} others: name one of {', '.join(files)}")
    pickles = sorted(name for name in names if name.lower().endswith(PICKLES))
    reason = f", and {pickles[0]} is a pickle, which can execute code when it is opened" if pickles else ""
    raise LoraFileError(f"{where} has no {LORA_WEIGHTS}{reason}")


def _download(repository: str, file: str | None) -> Path:
    try:
        path = _weights_of(repository, file)
        if path.name == PEFT_WEIGHTS:  # its alpha stands beside it
            with suppress(EntryNotFoundError):
                hf_hub_download(repository, (PurePosixPath(file or PEFT_WEIGHTS).parent / PEFT_CONFIG).as_posix())
        return path
    except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled) as error:
        raise LoraFileError(
            f"{repository}{f'/{file}' if file else ''} is neither here nor could it be had from the hub: {error}"
        ) from error


def _weights_of(repository: str, file: str | None) -> Path:
    try:
        return Path(hf_hub_download(repository, file or LORA_WEIGHTS))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        if file is not None:
            raise
    return Path(hf_hub_download(repository, _choose(HfApi().list_repo_files(repository), repository)))
