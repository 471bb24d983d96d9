"""What stands in the folder of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from PIL import Image

from qwen_image_finetune.config import Config, DataEntry, DatasetArguments
from qwen_image_finetune.config.text import read_yaml
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.data.sources import read_sets
from qwen_image_finetune.disk import history, runs, versions
from qwen_image_finetune.disk.reading import Unreadable, read_regular
from qwen_image_finetune.encoding import remembered
from qwen_image_finetune.judging.pages.shapes import Environment, Evaluation, Part, ReportError, Strip, shaped

REQUIRED = ("model.pretrained_model_name_or_path", "data.init_args.dataset_path")  # of every run


@dataclass(frozen=True)
class Sample:
    """A pair that was drawn while training."""

    key: str
    prompt: str
    pictures: dict[str, Image.Image]  # references, base and truth, by name
    drawn: dict[int, Image.Image]  # by step
    averaged: dict[int, Image.Image]  # the same by the average of the weights, where there was one


class Version:
    """The folder of a run, read; a run that still goes on can be read as well."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ReportError: `path` is no run, or a file of it lacks what every run has there.
            ConfigError, RunError: a file of the run is damaged.
        """
        if not (path / "config.yaml").is_file():
            raise ReportError(f"{path} holds no config.yaml: give the version folder of a run, OUTPUT_DIR/PROJECT/vN")
        self.path = path
        self.name = f"{path.resolve().parent.name}/{path.resolve().name}"
        written = read_yaml(path / "config.yaml")
        self.yaml = (path / "config.yaml").read_text(encoding="utf-8-sig")
        self.settings: dict[str, Any] = flat(cast(dict[str, Any], OmegaConf.to_container(written)))
        if lacking := [key for key in REQUIRED if key not in self.settings]:
            raise ReportError(f"{path / 'config.yaml'} is damaged: it lacks {lacking[0]}; put it back from a copy")
        self.metrics = history.read_metrics(path)
        self.environment: dict[str, Any] = self._json(history.ENVIRONMENT)
        self.best = history.read_best(path)
        measured = self._json("evaluation/evaluation.json")
        self.evaluation: Evaluation | None = (
            shaped(Evaluation, measured, path / "evaluation/evaluation.json") if measured else None
        )
        self.packages: dict[str, str] = shaped(Environment, self.environment, path / history.ENVIRONMENT).packages
        self.pairs = remembered.read(path)
        self.state = runs.outcome(path)

    def _json(self, name: str) -> dict[str, Any]:
        return history.read_object(self.path / name) or {}

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one of the metrics."""
        return [(line["step"], line[name]) for line in self.metrics if name in line]

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come, unless it is resumed."""
        return self.state != "running"

    @property
    def first_samples(self) -> int | None:
        """The step after which samples are drawn first; None where the run draws none."""
        return int(self.settings["validation.steps"]) if self.settings.get("validation.enabled") else None

    @property
    def first_measure(self) -> int | None:
        """The step after which the held-out loss is measured first; None where the run holds no pairs out."""
        chosen = self.settings.get("validation.dataset_path") or self.settings.get("validation.share")
        if self.first_samples is None or not chosen or not self.settings.get("validation.num_loss_pairs"):
            return None
        last = self.settings.get("train.max_train_steps") or math.inf  # where the run is saved, and so measured
        return int(min(self.first_samples, self.settings["train.checkpointing_steps"], last))

    def to_come(self, what: str, step: int) -> str:
        """When something that was not done yet is, in words."""
        total = self.settings.get("train.max_train_steps") or math.inf
        if self.is_over:
            return f"{what} come after step {step:,}; the run ended at step {self.steps:,}."
        return f"{what} come after step {step:,}" + (f", of which the run has {total:,}." if step > total else ".")

    @property
    def steps(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @cached_property
    def checkpoints(self) -> list[Path]:
        """Checkpoint folders by step."""
        return versions.checkpoint_folders(self.path)

    @cached_property
    def rows(self) -> list[Row]:
        """Pairs of the data set; none where it is not on this machine."""
        given = DatasetArguments(dataset_path=self.settings["data.init_args.dataset_path"])
        there = (entry for entry in given.entries if not entry.on_hub)
        here: list[str | DataEntry] = [entry for entry in there if Path(entry.path).expanduser().exists()]
        home = self.settings.get("data.init_args.shards_dir", "shards")
        return read_sets(DatasetArguments(dataset_path=here, shards_dir=home), masks=False)[0] if here else []

    @cached_property
    def samples(self) -> list[Sample]:
        """What was drawn while training, pair by pair."""
        found: dict[str, Sample] = {}
        folders = sorted(self.path.glob("samples/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for folder in folders:
            for place, strip in enumerate(_layout(folder / "layout.json")):
                try:
                    with Image.open(folder / f"{place}.png") as image:
                        parts = _cut(image.convert("RGB"), strip.parts)
                except (OSError, SyntaxError):  # a picture that is gone or torn: the others are shown
                    continue
                if "drawn" not in parts:
                    continue
                step, drawn = int(folder.name.removeprefix("step-")), parts.pop("drawn")
                averaged = parts.pop("averaged", None)
                sample = found.setdefault(strip.key, Sample(strip.key, strip.prompt, parts, {}, {}))
                sample.pictures.update(parts)
                sample.drawn[step] = drawn
                if averaged is not None:
                    sample.averaged[step] = averaged
        return list(found.values())


def _layout(file: Path) -> list[Strip]:
    """What is side by side in the pictures of a round; nothing where it was not kept.

    Raises:
        ReportError: the file holds something else.
    """
    try:
        return shaped(list[Strip], json.loads(read_regular(file)), file)
    except FileNotFoundError:
        return []
    except (Unreadable, ValueError, RecursionError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{file} is damaged: {error}; put it back from a copy, or remove it") from error


def _cut(strip: Image.Image, parts: list[Part]) -> dict[str, Image.Image]:
    """The pictures of a strip by name; a second reference is called "reference 2"."""
    found: dict[str, Image.Image] = {}
    for part in parts:
        name, number = part.name, 1
        while name in found:
            number += 1
            name = f"{part.name} {number}"
        found[name] = strip.crop((part.left, 0, part.left + part.width, strip.height))
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys; what an optimizer or a dataset takes counts as well."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def defaults() -> dict[str, Any]:
    """What every key is when nothing is written, by its dotted name."""
    return flat(Config.model_validate({"model": {"pretrained_model_name_or_path": "x"}}).model_dump(mode="json"))


def changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by their dotted keys, that are not at their defaults."""
    usual = defaults()
    return {key: value for key, value in settings.items() if key not in usual or usual[key] != value}


def said(value: Any) -> str:
    """A value as a configuration would say it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
