"""What `qif evaluate` was asked for: which pairs, which candidates. All that can be refused before a model loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qwen_image_finetune.config import Config, DataEntry, load_config
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.part import Part
from qwen_image_finetune.data.sources import read_sets
from qwen_image_finetune.disk import history, versions
from qwen_image_finetune.encoding import remembered
from qwen_image_finetune.lora.sources import find_tuned

BASE, COPY = "base", "copy of the input"


class EvaluationError(ValueError):
    """Something that cannot be evaluated as asked."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: Path  # a configuration, or the folder of a run
    dataset: Path | str | None  # a folder, or an address on the hub; None: the pairs that the run held out
    lora: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()  # "all", "best", "latest" or steps, of the run
    strength: tuple[float, ...] = (1.0,)
    output: Path | None = None
    overwrite: bool = False  # an output folder that is there
    count: int | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """Something that draws."""

    name: str
    source: Path | str | None = None  # LoRA, or a checkpoint folder with a whole transformer
    strength: float = 0.0
    tuned: Path | None = None  # the checkpoint of a transformer tuned as a whole, if that is its source


def open_request(request: Request) -> tuple[Path | None, Config]:
    """(the run, where one is named; the configuration, reading the pairs to evaluate on).

    Raises:
        EvaluationError: the folder is no run, or a number means nothing.
    """
    run = request.config if request.config.is_dir() else None
    if run is not None and not (run / "config.yaml").is_file():
        raise EvaluationError(f"{run} holds no config.yaml: give a configuration, or the version folder of a run")
    if request.count is not None and request.count < 1:
        raise EvaluationError(f"--count {request.count}: at least one picture")
    if request.steps is not None and request.steps < 1:
        raise EvaluationError(f"--steps {request.steps}: at least 1, or leave it out for the model's own")
    if request.checkpoints and run is None:
        raise EvaluationError("--checkpoints are those of a run: give its version folder in place of the configuration")
    file = request.config / "config.yaml" if run else request.config
    path: str | list[str | DataEntry] = str(request.dataset)
    if request.dataset is None:
        if run is None:
            raise EvaluationError("name the folder of pairs to evaluate on; only a run knows which ones it held out")
        written = load_config(file, request.overrides)
        path = written.validation.dataset_path or written.data.init_args.dataset_path
    named = json.dumps(path, default=DataEntry.model_dump)
    overrides = [*request.overrides, f"data.init_args.dataset_path={named}"]
    return run, with_masks_there_are(load_config(file, overrides))


def choose_pairs(dataset: ImageDataset, run: Path | None, own: bool) -> tuple[ImageDataset, list[str]]:
    """(the pairs to evaluate on, what is to be known about them).

    Args:
        own: those alone that the run held out of its training, found by their content.

    Raises:
        EvaluationError: it held none out, or they are not there any more.
    """
    known = None if run is None else remembered.read(run)
    if own:
        return _own_pairs(dataset, run, known)
    if known is None:
        return dataset, []
    trained = [row.key for row in dataset.rows if known.was_trained_on(remembered.content_of(row))]
    if not trained:
        return dataset, []
    names = ", ".join(trained[:3]) + ", ..." * (len(trained) > 3)
    return dataset, [
        f"{len(trained)} of {len(dataset)} pairs were trained on ({names}): what is measured on them is what the run "
        "remembers; `qif evaluate RUN` takes those that it held out"
    ]


def _own_pairs(
    dataset: ImageDataset, run: Path | None, known: remembered.Remembered | None
) -> tuple[ImageDataset, list[str]]:
    if known is None or not known.held_out:
        raise EvaluationError(
            f"{run} held no pairs out of its training (validation.share or validation.dataset_path does): name a "
            "folder of pairs to evaluate on"
        )
    edits = [place for place, row in enumerate(dataset.rows) if not row.shared.identity]
    places = [place for place in edits if known.was_held_out(remembered.content_of(dataset.rows[place]))]
    gone = len(known.held_out) - len(places)
    if not places:
        folders = ", ".join(sorted({str(Path(row.target).parent) for row in dataset.rows}))
        raise EvaluationError(f"none of the {gone} pairs that {run} held out of its training is in {folders} any more")
    notes = [f"{gone} of {len(known.held_out)} held-out pairs are not there any more"] if gone > 0 else []
    return Part(dataset, places), notes


def with_masks_there_are(config: Config) -> Config:
    """The configuration, without masks where it reads them and the pairs have none.

    A run that weighs its loss by masks needs them; here the truth shows the edited region as well.
    """
    arguments = config.data.init_args
    if not arguments.use_edit_mask:
        return config
    rows = read_sets(arguments, masks=True)[0]
    if not rows or any(row.mask_name is not None for row in rows):
        return config
    data = config.data.model_copy(update={"init_args": arguments.model_copy(update={"use_edit_mask": False})})
    return config.model_copy(update={"data": data})


def candidates(request: Request, run: Path | None) -> list[Candidate]:
    """Base, copy, and every LoRA or checkpoint at every strength."""
    sources: dict[str, Path | str] = {lora: lora for lora in request.lora}
    wanted = request.checkpoints or (("best",) if run is not None and not request.lora else ())
    if run is not None:
        sources |= {folder.name: folder for word in wanted for folder in checkpoints(run, word)}
    found = [Candidate(BASE), Candidate(COPY)]
    for name, source in sources.items():
        if tuned := find_tuned(source):  # it has no strength
            found.append(Candidate(name, source, 1.0, tuned))
        else:
            found += [Candidate(f"{name} x {strength:g}", source, strength) for strength in request.strength]
    return found


def checkpoints(run: Path, word: str) -> list[Path]:
    """The checkpoints of a run that "all", "best", "latest" or a step means; best is latest without a best.

    Raises:
        EvaluationError: there are none.
    """
    ordered = versions.checkpoint_folders(run)
    folders = {versions.step_of(path): path for path in ordered}
    best = history.best_checkpoint(run)
    if word == "all" and ordered:
        return ordered
    if word == "best" and best is not None and best.is_dir():
        return [best]
    if word in ("best", "latest") and ordered:
        return ordered[-1:]
    if word.isdecimal() and int(word) in folders:
        return [folders[int(word)]]
    raise EvaluationError(
        f"{run} has no checkpoint {word!r}: there are those of the steps {sorted(folders)}; 'all', 'best' and 'latest' "
        "choose among them"
    )
