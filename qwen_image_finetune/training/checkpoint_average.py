"""`qif average`: the mean of saved checkpoints, as weights for users.

Of LoRAs the factors are averaged, as the moving average of a run does it: between checkpoints of one run, whose factors
moved little and together, that is near to the mean of the changes, and keeps the rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen_image_finetune.disk.files import staged_folder
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.disk.versions import LORA_WEIGHTS, checkpoint_folders
from qwen_image_finetune.lora.sources import TRANSFORMER, TUNED
from qwen_image_finetune.training.trained import REMAINDER, halves, joined


class AverageError(ValueError):
    """Checkpoints that have no mean, in words for the person who named them."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    checkpoints: tuple[Path, ...]
    output: Path
    last: int | None = None
    decay: float = 1.0
    overwrite: bool = False


def average(request: Request) -> list[tuple[Path, float]]:
    """Write the mean of checkpoints to a folder that is used like one of them; returns each with its share.

    A file of the result is in memory at a time; sums are in float64. Checkpoints of full fine-tuning enter with all
    their bits, and leave in the precision that they are saved in.

    Raises:
        AverageError: fewer than two checkpoints, or of different models, kinds or ranks.
        OutputError: the output is there already, or belongs to a run.
    """
    folders = chosen(request)
    files = common_files(folders)
    check_output(request.output, request.overwrite, folder=True)
    raw = [request.decay**age for age in reversed(range(len(folders)))]
    shares = [value / sum(raw) for value in raw]
    told = json.dumps([[folder.name, round(share, 6)] for folder, share in zip(folders, shares, strict=True)])
    with staged_folder(request.output) as staged:
        for name in files:
            (staged / name).parent.mkdir(exist_ok=True)
            if name.suffix == ".safetensors":
                tensors, metadata = mean_of_file(folders, shares, name)
                save_file(tensors, staged / name, {**metadata, "qif.average_of": told})
            else:
                shutil.copyfile(folders[-1] / name, staged / name)
    return list(zip(folders, shares, strict=True))


def chosen(request: Request) -> list[Path]:
    """The checkpoints, oldest first as they were named; of a version folder all of them, or the last ones."""
    found = [
        folder
        for path in request.checkpoints
        for folder in (checkpoint_folders(path.expanduser()) or [path.expanduser()])
    ]
    folders = found[-request.last :] if request.last is not None else found
    for folder in folders:
        if not (folder / LORA_WEIGHTS).is_file() and not (folder / TUNED).is_file():
            raise AverageError(f"{folder} is no checkpoint: it has neither {LORA_WEIGHTS} nor {TRANSFORMER}/")
    if len(folders) < 2:
        raise AverageError(f"{len(folders)} checkpoint: a mean is of two or more; name them, or a version with several")
    return folders


def common_files(folders: Sequence[Path]) -> list[Path]:
    """The files for users, by their path in a checkpoint; the same in all of them."""

    def files(folder: Path) -> list[Path]:
        if (folder / LORA_WEIGHTS).is_file():
            return [Path(LORA_WEIGHTS)]
        return sorted(file.relative_to(folder) for file in (folder / TRANSFORMER).iterdir() if file.is_file())

    first = files(folders[0])
    for folder in folders[1:]:
        if files(folder) != first:
            raise AverageError(f"{folder} holds other files than {folders[0]}: both must be of one model and one kind")
    return first


def mean_of_file(
    folders: Sequence[Path], shares: Sequence[float], name: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The mean of every tensor of a file, in the precision of the newest, with the newest one's metadata."""
    with ExitStack() as open_files:
        try:
            readers = [Reader(folder, name, open_files) for folder in folders]
        except (SafetensorError, OSError) as error:
            raise AverageError(f"{name} of a checkpoint cannot be read: {error}") from error
        first, newest = readers[0], readers[-1]
        for reader, folder in zip(readers, folders, strict=True):
            if reader.shapes() != first.shapes():
                raise AverageError(
                    f"{folder / name} holds other tensors or other shapes than {folders[0] / name}: checkpoints of one "
                    "run, with one rank, have a mean"
                )
        return {key: newest.as_saved(key, total(readers, shares, key)) for key in newest.keys}, newest.metadata


def total(readers: Sequence[Reader], shares: Sequence[float], key: str) -> Tensor:
    """Sum of shares times tensors, float64."""
    summed = torch.zeros((), dtype=torch.float64)
    for reader, share in zip(readers, shares, strict=True):
        summed = summed + share * reader.exact(key).double()
    return summed


class Reader:
    """A file of a checkpoint, its tensors with all the bits that were saved."""

    def __init__(self, folder: Path, name: Path, open_files: ExitStack) -> None:
        self.file: Any = open_files.enter_context(safe_open(folder / name, framework="pt"))
        rest = folder / REMAINDER
        self.rest: Any = open_files.enter_context(safe_open(rest, framework="pt")) if rest.is_file() else None
        self.keys: list[str] = list(self.file.keys())
        self.with_rest: set[str] = set() if self.rest is None else set(self.rest.keys())
        self.metadata: dict[str, str] = dict(self.file.metadata() or {})

    def shapes(self) -> dict[str, list[int]]:
        return {key: self.file.get_slice(key).get_shape() for key in self.keys}

    def exact(self, key: str) -> Tensor:
        saved: Tensor = self.file.get_tensor(key)
        return joined(saved, self.rest.get_tensor(key)) if key in self.with_rest else saved

    def as_saved(self, key: str, value: Tensor) -> Tensor:
        """float64 in the precision of the file; bfloat16 as a checkpoint rounds it."""
        dtype = self.file.get_tensor(key).dtype
        return halves(value.float())[0] if dtype == torch.bfloat16 else value.to(dtype)
