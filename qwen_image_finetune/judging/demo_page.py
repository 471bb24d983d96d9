"""The page that `qif demo` ends with: faces learnt over time, before and after, numbers against the base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from qwen_image_finetune.data.images import open_upright
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.reading import read_json
from qwen_image_finetune.judging.evaluate import RESULTS, TRUTH
from qwen_image_finetune.judging.pages.curves import Curve, Series, charts, legend
from qwen_image_finetune.judging.pages.html import cards, document, escape, picture, section
from qwen_image_finetune.judging.pages.reading import Sample, Version
from qwen_image_finetune.judging.report import evaluation
from qwen_image_finetune.judging.request import BASE, COPY
from qwen_image_finetune.machine.console import duration
from qwen_image_finetune.toy.measure import foreground_iou

SIDE = 128  # of a picture on the page, in pixels; those of the toy bases have 64
MOST_COLUMNS = 5  # of steps
NEXT = (
    ("look at pictures, runs and samples in the browser", "qif studio ."),
    ("ask what a folder of your own pairs needs, and write a configuration for it", "qif init my_pairs"),
    ("see what runs on this machine", "qif doctor"),
)


@dataclass(frozen=True)
class Shown:
    """What one family's run left behind."""

    title: str
    version: Path
    lora: Path
    training_seconds: float


def scores(version: Path) -> tuple[float, float]:
    """Mean foreground IoU of the masks that the base and the LoRA drew in the evaluation of a run."""
    folder = version / "evaluation"
    found = {one["name"]: _iou(folder, one) for one in read_json(folder / RESULTS)["candidates"]}
    (tuned,) = (name for name in found if name not in (BASE, COPY))
    return found[BASE], found[tuned]


def _iou(folder: Path, candidate: dict[str, Any]) -> float:
    pairs = [
        (open_upright(folder / picture["file"]), open_upright(folder / TRUTH / f"{place}.png"))
        for place, picture in enumerate(candidate["pictures"])
    ]
    return fmean(foreground_iou(drawn, truth) for drawn, truth in pairs)


def write_page(file: Path, shown: Sequence[Shown]) -> Path:
    """Write the page from the folders of the runs, which are evaluated and have their reports; returns its file."""
    found = [(one, Version(one.version)) for one in shown]
    parts = [section("learnt", "How much of each mask is right", learning(found))]
    for one, version in found:
        parts.append(cards(headline(one)))
        name = one.version.parent.name
        parts.append(section(name, f"{one.title}: faces nobody trained on", filmstrip(version.samples)))
        report = os.path.relpath(one.version / "report.html", file.parent)
        link = f'<p><a href="{escape(report)}">The report of this run</a> has its curves, data, files and settings.</p>'
        parts.append(
            section(f"{name}-numbers", f"{one.title}: against the base", evaluation(version.evaluation) + link)
        )
    commands = "".join(f"<p>To {escape(what)}:</p><pre>{escape(command)}</pre>" for what, command in NEXT)
    parts.append(section("next", "What comes next", commands))
    subtitle = "Two small models learn, from twenty pairs each, to draw the segmentation mask of a face."
    write_atomic(file, document("The demonstration", subtitle, parts))
    return file


def headline(one: Shown) -> list[tuple[str, str]]:
    """The numbers of a family."""
    before, after = scores(one.version)
    return [
        ("model", one.title),
        ("foreground IoU, base alone", f"{before:.2f}"),
        ("foreground IoU, with the LoRA", f"{after:.2f}"),
        ("trained in", duration(one.training_seconds)),
        ("LoRA file", f"{one.lora.stat().st_size / 2**20:.1f} MiB"),
    ]


def learning(found: Sequence[tuple[Shown, Version]]) -> str:
    """Foreground IoU of the samples over the steps, the base's at step 0, and the held-out loss."""
    overlap = [Series(one.title, overlaps(version.samples), place) for place, (one, version) in enumerate(found)]
    loss = [
        Series(one.title, version.points("held_out_difference"), place) for place, (one, version) in enumerate(found)
    ]
    figures = [
        Curve("Foreground IoU of the samples (1 is the true mask)", overlap, zero=True),
        Curve("Held-out loss minus the base's (below 0 is better)", loss, zero=True),
    ]
    return legend([one.title for one, _ in found]) + charts(figures)


def overlaps(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(step, mean foreground IoU) of what was drawn, beginning with the base at step 0."""
    drawn: dict[int, list[float]] = {}
    for sample in samples:
        rounds = {0: sample.pictures["base"]} if "base" in sample.pictures else {}
        for step, image in (rounds | sample.drawn).items():
            drawn.setdefault(step, []).append(foreground_iou(image, sample.pictures["truth"]))
    return [(step, fmean(values)) for step, values in sorted(drawn.items())]


def filmstrip(samples: Sequence[Sample]) -> str:
    """A row for each face: the face, what the base draws, what is drawn after more and more steps, the truth."""
    every = sorted({step for sample in samples for step in sample.drawn})
    last = max(min(MOST_COLUMNS, len(every)) - 1, 1)
    steps = sorted({every[round(place * (len(every) - 1) / last)] for place in range(last + 1)}) if every else []
    columns = ["face", "base alone", *(f"step {step}" for step in steps), "true mask"]
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    rows = []
    for sample in samples:
        images = [sample.pictures.get("reference"), sample.pictures.get("base"), *map(sample.drawn.get, steps)]
        cells = zip(columns, [*images, sample.pictures.get("truth")], strict=True)
        rows.append(f"<tr>{''.join(_cell(name, image, sample.key) for name, image in cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _cell(column: str, image: Image.Image | None, key: str) -> str:
    inner = "-" if image is None else picture(enlarged(image), f"{key}, {column}", SIDE)
    return f'<td data-head="{escape(column)}">{inner}</td>'


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture with its pixels visible."""
    zoom = max(SIDE // image.height, 1)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
