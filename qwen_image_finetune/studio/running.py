"""Jobs made from what a person asks for: a run that starts or goes on, an evaluation, pictures drawn with a LoRA."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwen_image_finetune.config import Config
from qwen_image_finetune.config.text import parse_mapping
from qwen_image_finetune.config.tree import put
from qwen_image_finetune.disk import runs, versions
from qwen_image_finetune.studio import form
from qwen_image_finetune.studio.grid import Wish
from qwen_image_finetune.studio.jobs import CONFIGURATION, Job, Jobs, Step
from qwen_image_finetune.studio.shelf import Refused, Shelf

MOST_PICTURES = 64  # of one grid


def start(shelf: Shelf, jobs: Jobs, text: str, title: str | None = None) -> Job:
    """Queue a run.

    Raises:
        Refused: the configuration cannot be run.
    """
    config = checked(shelf, text)
    project = (shelf.root / config.logging.project_dir).resolve().relative_to(shelf.root).as_posix()
    for folder in config.data.init_args.folders:
        if (shelf.root / folder).is_dir():
            shelf.sealed(shelf.root / folder)
    about = {"project": project, "name": config.logging.tracker_project_name}
    steps = [Step("train", [f"{{job}}/{CONFIGURATION}"])]
    return jobs.add("train", title or config.logging.tracker_project_name, steps, True, text, about)


def checked(shelf: Shelf, text: str) -> Config:
    """Raises Refused with everything that is wrong."""
    found = form.check(text, shelf)
    if found.config is None:
        raise Refused("\n".join(problem.words for problem in found.problems))
    return found.config


def configuration(shelf: Shelf, run: str) -> str:
    """The configuration of a run, as it was decided.

    Raises:
        Refused: it has none yet, or one that is not for here.
    """
    path = shelf.inside(f"{run}/config.yaml")
    if not path.is_file():
        raise Refused(f"{run} has no configuration yet")
    text = path.read_text(encoding="utf-8", errors="replace")
    checked(shelf, text)
    return text


def go_on(shelf: Shelf, jobs: Jobs, run: str) -> Job:
    """Queue the rest of a run, from its newest checkpoint.

    Raises:
        Refused: it has none, or still runs.
    """
    path = shelf.sealed(shelf.run(run))
    if runs.outcome(path) == "running":
        raise Refused("it still runs", 409)
    found = versions.checkpoint_folders(path)
    if not found:
        raise Refused("nothing was saved of it: start it anew")
    tree: Any = OmegaConf.to_container(parse_mapping(configuration(shelf, run), "its configuration"))
    put(tree, "train.resume_from_checkpoint", shelf.name(found[-1]))
    put(tree, "logging.output_dir", shelf.name(path.parent.parent) or ".")
    put(tree, "logging.tracker_project_name", path.parent.name)
    return start(shelf, jobs, form.as_yaml(tree), f"{path.parent.name}/{path.name}, continued")


def evaluate(shelf: Shelf, jobs: Jobs, run: str, data_set: str, count: int | None, checkpoints: str) -> Job:
    """Queue measuring a run on pairs that it has not seen.

    Args:
        data_set: folder of the pairs; "" for those that the run has kept aside.
        count: how many of them; None for all.
    """
    path = shelf.sealed(shelf.run(run))
    pairs = [str(shelf.sealed(shelf.folder(data_set)))] if data_set else []
    configuration(shelf, run)
    if checkpoints not in ("best", "latest", "all"):
        raise Refused("checkpoints are best, latest or all")
    words = [str(path), *pairs, "--checkpoints", checkpoints]
    if count is not None:
        if not 1 <= count <= 10_000:
            raise Refused("at least one pair is measured")
        words += ["--count", str(count)]
    return jobs.add("evaluate", f"Measure {path.parent.name}/{path.name}", [Step("evaluate", words)], True,
                    about={"run": run})  # fmt: skip


def draw(
    shelf: Shelf,
    jobs: Jobs,
    run: str,
    pictures: Sequence[Path],
    prompt: str,
    checkpoints: Sequence[str],
    strengths: Sequence[float],
    seed: int,
    steps: int | None,
) -> Job:
    """Queue a grid of pictures: each checkpoint at each strength, all with the same noise. The base is strength 0."""
    path = shelf.sealed(shelf.run(run))
    text = configuration(shelf, run)
    known = [folder.name for folder in versions.checkpoint_folders(path)]
    if unknown := [name for name in checkpoints if name not in known]:
        raise Refused(f"{run} has no {unknown[0]}", 404)
    if not prompt.strip():
        raise Refused("write what is to be done to the picture")
    if not all(-4 <= strength <= 4 for strength in strengths) or not 0 <= seed < 2**63:
        raise Refused("strengths lie between -4 and 4, seeds from 0 on")
    if steps is not None and not 1 <= steps <= 200:
        raise Refused("from 1 to 200 sampler steps")
    cells = [("base", None, 0.0), *((name, path / name, strength) for name in checkpoints for strength in strengths)]
    if len(cells) > MOST_PICTURES:
        raise Refused(f"{len(cells)} pictures at once; at most {MOST_PICTURES}")
    drawn = [None if lora is None else (str(lora), strength) for _, lora, strength in cells]
    wish = Wish(prompt, [str(picture) for picture in pictures], seed, steps, drawn)
    work = [Step("grid", [f"{{job}}/{CONFIGURATION}", "{job}/.", json.dumps(asdict(wish))])]
    told = [{"checkpoint": name, "strength": strength} for name, _, strength in cells]
    about = {"run": run, "prompt": prompt, "cells": json.dumps(told), "seed": str(seed)}
    return jobs.add("predict", f"Draw with {path.parent.name}/{path.name}", work, True, text, about)
