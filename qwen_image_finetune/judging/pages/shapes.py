"""What pages read from the files of a run, which may have been edited, cut short, or written by another program."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from qwen_image_finetune.judging.metrics import Metric

Shape = TypeVar("Shape")


class ReportError(ValueError):
    """A folder about which nothing can be written."""


@dataclass(frozen=True)
class Mean:
    """Of one measure over the pictures of a candidate, with its interval."""

    mean: float
    low: float | None
    high: float | None


def mean_words(value: Mean | None) -> str:
    """A mean with its interval, as pages and cards say it."""
    if value is None:
        return "-"
    ends = "" if value.low is None or value.high is None else f" [{value.low:.3g}, {value.high:.3g}]"
    return f"{value.mean:.4g}{ends}"


@dataclass(frozen=True)
class Measured:
    """A candidate of an evaluation; None is a measure that none of its pictures has."""

    name: str
    means: dict[str, Mean | None]


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json, as far as pages show it."""

    dataset: str
    pictures: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    metrics: dict[str, Metric]
    candidates: list[Measured]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Where one picture stands in a strip, in pixels."""

    name: str
    left: int
    width: int


@dataclass(frozen=True)
class Strip:
    """A line of layout.json: what is side by side in one picture of a round of samples."""

    key: str
    prompt: str
    parts: list[Part]


@dataclass(frozen=True)
class Environment:
    """environment.json, as far as runs are compared by it."""

    packages: dict[str, str] = field(default_factory=dict)


def shaped(shape: type[Shape] | Any, found: Any, file: Path) -> Shape:
    """What was read from a file, as a `shape`; what it holds beside that is passed over.

    Raises:
        ReportError: names the file and the first thing in it that is not as it should be.
    """
    try:
        checked: Shape = TypeAdapter(shape).validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ReportError(
            f"{file} is damaged: {place or 'it'}: {first['msg']}; put it back from a copy, or remove it"
        ) from error
    return checked
