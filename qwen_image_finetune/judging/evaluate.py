"""`qif evaluate`: is an edit any good, on pairs that were not trained on?

The base, LoRAs at several strengths, and the input as it is draw or stand for the same rows with the same noise; every
picture is measured against its truth.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config, resolve_family
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.part import Part, spread
from qwen_image_finetune.disk.files import short_name, write_atomic
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.drawing import samples
from qwen_image_finetune.drawing.build import check_loras
from qwen_image_finetune.drawing.predict import Conditions
from qwen_image_finetune.drawing.tuned import TunedPredictor
from qwen_image_finetune.encoding.cache import EncodedDataset, TextVariant
from qwen_image_finetune.encoding.pairs import open_dataset
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.out_of_memory import explained
from qwen_image_finetune.judging import metrics
from qwen_image_finetune.judging.intervals import bootstrap
from qwen_image_finetune.judging.request import BASE, COPY, Candidate, Request, candidates, choose_pairs, open_request
from qwen_image_finetune.lora.sources import find_lora
from qwen_image_finetune.machine import console
from qwen_image_finetune.records import Encoded, collate

if TYPE_CHECKING:
    from qwen_image_finetune.drawing.predict import Predictor

RESULTS = "evaluation.json"
HELD_OUT = "held out of training"  # said of the run's own
TRUTH, INPUT = "truth", "input"  # folders of what the candidates' pictures are looked at beside


@dataclass(frozen=True)
class Pair:
    """A pair, encoded once for all candidates. All pairs stay in memory: pictures only at the size of the target."""

    key: str
    prompt: str
    source: Image | None  # the (first) reference
    target: Image
    mask: Image | None
    wanted: Encoded
    negative: Encoded | None


def evaluate(request: Request) -> dict[str, Any]:
    """Draw, measure and write; returns what evaluation.json holds.

    Raises:
        OutputError: the output folder holds something else than an evaluation, without `overwrite`.
        EvaluationError: no checkpoints where some are asked for, or numbers that mean nothing.
        ConfigError, DataError, LoraFileError: before the model loads, as far as files show.
    """
    run, config = open_request(request)
    found = candidates(request, run)
    # What does not fit is refused before the model loads; a LoRA is read once, whatever its strengths.
    check_loras(config, [find_lora(source) for source in {c.source: None for c in found if c.tuned is None} if source])
    output = request.output or (run / "evaluation" if run else Path("evaluation"))
    check_output(output, request.overwrite, lambda folder: (folder / RESULTS).is_file(), folder=True)
    family = get_family(resolve_family(config, download=True)[0])
    dataset, notes = choose_pairs(open_dataset(config, family, decode=True), run, request.dataset is None)
    if request.count is not None:
        dataset = Part(dataset, spread(request.count, len(dataset)))

    lpips = metrics.find_lpips()
    notes += [lpips] if isinstance(lpips, str) else []
    for note in notes:
        console.note(note)
    drawer = TunedPredictor(config)
    with explained(config, "predicting"):
        rows = encode(config, drawer.predictor, dataset, request)
    if all(row.source is None for row in rows):
        found = [candidate for candidate in found if candidate.name != COPY]
    results = []
    for candidate, folder in zip(found, folder_names([candidate.name for candidate in found]), strict=True):
        with explained(config, "predicting"):
            drawn = draw(drawer, candidate, rows, request)
        files = samples.save(output / folder, drawn)
        results.append(result(candidate, rows, drawn, lpips, [str(file.relative_to(output)) for file in files]))
    add_differences(results)
    save_inputs(output, rows)
    evaluation = {
        "model": config.model.pretrained_model_name_or_path,
        "dataset": str(request.dataset or HELD_OUT),
        "run": None if run is None else str(run),
        "pictures": len(rows),
        "seed": request.seed,
        "num_inference_steps": request.steps or drawer.predictor.defaults.num_inference_steps,
        "guidance_scale": drawer.predictor.defaults.guidance_scale if request.guidance is None else request.guidance,
        "metrics": {name: asdict(metric) for name, metric in metrics.METRICS.items()},
        "notes": notes,
        "candidates": results,
    }
    write_atomic(output / RESULTS, json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomic(output / "evaluation.csv", table(results))
    console.say(summary(results))
    console.say(f"{output / RESULTS}, {output / 'evaluation.csv'}")
    return evaluation


def encode(config: Config, predictor: Predictor, dataset: ImageDataset, request: Request) -> list[Pair]:
    """The rows as training would see them, on the CPU."""
    folder = loading.checkpoint_folder(config, predictor.family)
    encoder = EncodedDataset(config, predictor.family, dataset, folder, predictor.pipe.vae.dtype)
    guided_twice = predictor.guidance(request.guidance).prompt != 1.0
    rows = []
    with predictor.encoding(), console.progress("encoding the pairs", len(dataset)) as update:
        for index in range(len(dataset)):
            example = dataset.load(index)
            other = TextVariant(predictor.family.negative_prompt)
            negative = encoder.encode(predictor.pipe, example, other) if guided_twice else None
            source = samples.source_of(example)
            wanted = encoder.encode(predictor.pipe, example)
            rows.append(Pair(example.key, example.prompt, source, example.target, example.mask, wanted, negative))
            update(index + 1)
    return rows


def draw(drawer: TunedPredictor, candidate: Candidate, rows: Sequence[Pair], request: Request) -> list[Image]:
    """What a candidate makes of every row; each row has its own noise, the same for all candidates."""
    if candidate.name == COPY:
        return [row.source or row.target.copy() for row in rows]
    use(drawer, candidate)
    predictor = drawer.predictor
    drawn = []
    with console.progress(f"drawing: {candidate.name}", len(rows)) as update, torch.no_grad():
        for place, row in enumerate(rows):
            conditions = Conditions(collate([row.wanted]), None if row.negative is None else collate([row.negative]))
            guidance = predictor.guidance(request.guidance)
            latents = predictor.sample(conditions, guidance, [request.seed + place], request.steps)
            drawn += predictor.family.decode(predictor.pipe, latents)
            update(place + 1)
    return drawn


def use(drawer: TunedPredictor, candidate: Candidate) -> None:
    """Make it draw as the candidate does."""
    drawer.load_transformer(candidate.tuned)
    if candidate.source is not None and candidate.tuned is None:
        drawer.load_lora(candidate.source, candidate.strength)


def result(
    candidate: Candidate, rows: Sequence[Pair], drawn: Sequence[Image], lpips: metrics.Lpips | str, files: Sequence[str]
) -> dict[str, Any]:
    """Measures of every picture, and their means."""
    pictures: list[dict[str, Any]] = []
    for row, picture, file in zip(rows, drawn, files, strict=True):
        ours, truth = metrics.pixels(picture), metrics.pixels(row.target)
        source = None if row.source is None else metrics.pixels(row.source)
        edited = None if row.mask is None else np.asarray(row.mask) > 127
        values = metrics.measure(ours, truth, source, edited)
        values["lpips"] = None if isinstance(lpips, str) else lpips(ours, truth)
        pictures.append({"key": row.key, "prompt": row.prompt, "file": file, **values})
    return {
        "name": candidate.name,
        "source": None if candidate.source is None else str(candidate.source),
        "strength": candidate.strength,
        "means": {name: mean([picture[name] for picture in pictures]) for name in metrics.METRICS},
        "pictures": pictures,
    }


def mean(values: Sequence[float | None]) -> dict[str, float | int | None] | None:
    """Mean and bootstrap interval of the pictures that have a value; None if none has."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    interval = bootstrap(present)
    ends = [end if math.isfinite(end) else None for end in interval[1:]]
    return {"mean": interval.mean, "low": ends[0], "high": ends[1], "pictures": len(present)}


def add_differences(results: Sequence[dict[str, Any]]) -> None:
    """Add to each result the mean difference of its pictures from the base's: the pairs' own spread cancels."""
    base = next(one for one in results if one["name"] == BASE)
    for one in results:
        pairs = list(zip(one["pictures"], base["pictures"], strict=True))
        one["difference_from_base"] = {
            name: mean([a[name] - b[name] if a[name] is not None and b[name] is not None else None for a, b in pairs])
            for name in metrics.METRICS
        }


def save_inputs(output: Path, rows: Sequence[Pair]) -> None:
    """What the pictures of the candidates are to be looked at beside."""
    samples.save(output / TRUTH, [row.target for row in rows])
    if all(row.source is not None for row in rows):
        samples.save(output / INPUT, [row.source for row in rows if row.source is not None])


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line a candidate and picture, as CSV."""
    text = io.StringIO()
    names = ["candidate", "strength", "key", "file", *metrics.METRICS]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for one in results:
        for picture in one["pictures"]:
            writer.writerow({"candidate": one["name"], "strength": one["strength"], **picture})
    return text.getvalue()


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Means with half the width of their intervals, for the terminal."""
    shown = [name for name in metrics.METRICS if any(one["means"][name] for one in results)]
    width = max(len(one["name"]) for one in results)
    lines = [" " * width + "".join(f"{name:>16}" for name in shown)]
    for one in results:
        cells = []
        for name in shown:
            value = one["means"][name]
            half = "" if value is None or value["low"] is None else f" ±{(value['high'] - value['low']) / 2:.2g}"
            cells.append("-" if value is None else f"{value['mean']:.4g}{half}")
        lines.append(one["name"].ljust(width) + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def folder_names(names: Sequence[str]) -> list[str]:
    """A folder name for each candidate's name, all different, also on disks that ignore case."""
    found: list[str] = []
    for name in names:
        slug = re.sub(r"(?:[^\w.-]|-(?!\d))+", "-", name).strip("-.") or "candidate"  # the minus of a strength stays
        slug = short_name(slug, "")
        numbered = itertools.chain([slug], (f"{slug}-{number}" for number in itertools.count(2)))
        taken = {TRUTH, INPUT, *(folder.casefold() for folder in found)}
        found.append(next(folder for folder in numbered if folder.casefold() not in taken))
    return found
