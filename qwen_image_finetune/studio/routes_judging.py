"""Addresses of judging and trying: runs side by side, measured, drawn with, and taken away."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from qwen_image_finetune.config.registry import FAMILIES, index_of
from qwen_image_finetune.disk import versions
from qwen_image_finetune.judging.pages.reading import said
from qwen_image_finetune.studio import form, pushing, running, uploads, verbs
from qwen_image_finetune.studio.jobs import Job
from qwen_image_finetune.studio.routes_common import Ask, Studio, asked, bounded, file, get, number, post, queued
from qwen_image_finetune.studio.routes_runs import about
from qwen_image_finetune.studio.shelf import Refused
from qwen_image_finetune.studio.thumbnails import small

MOST_COMPARED = 8  # runs side by side
MOST_OFFERED = 40  # further runs to compare with
FORMATS = {"diffusers": "diffusers", "comfy": "ComfyUI", "kohya": "kohya"}


def compare(studio: Studio, request: Request) -> Response:
    """Runs side by side."""
    names = list(dict.fromkeys(request.query_params.getlist("run")))
    if not names or len(names) > MOST_COMPARED:
        raise Refused(f"from 1 to {MOST_COMPARED} runs are compared")
    settings = [form.changed_settings(studio.runs.settings(name)) for name in names]
    keys = sorted({key for each in settings for key in each})
    differing = [key for key in keys if len({json.dumps(each.get(key), sort_keys=True) for each in settings}) > 1]
    rows = [{"key": key, "label": form.FRONT.get(key, (key,))[0],
             "values": [said(each[key]) if key in each else "default" for each in settings]}
            for key in differing]  # fmt: skip
    steps = [studio.runs.sample_steps(name) for name in names]
    layouts = [studio.runs.layout(name, each[-1]) if each else [] for name, each in zip(names, steps, strict=True)]
    newest = studio.runs.newest(studio.shelf.found().runs)
    return studio.page(
        "compare.html",
        runs=[studio.runs.brief(name) for name in names],
        rows=rows,
        samples=side_by_side(names, steps, layouts),
        evaluations=[(studio.runs.brief(name), found) for name in names if (found := studio.runs.evaluation(name))],
        others=[studio.runs.brief(name) for name in newest[:MOST_OFFERED] if name not in names],
    )


def side_by_side(
    names: Sequence[str], steps: Sequence[Sequence[int]], layouts: Sequence[Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The newest sample of every pair that a run has drawn, run beside run."""
    found: dict[str, dict[str, Any]] = {}
    for name, drawn, layout in zip(names, steps, layouts, strict=True):
        for place, strip in enumerate(layout):
            row = found.setdefault(strip["key"], {"key": strip["key"], "prompt": strip["prompt"], "pictures": []})
            for part, each in enumerate(strip["parts"]):
                if each["name"] == "drawn" or not any(shown["name"] == each["name"] for shown in row["pictures"]):
                    row["pictures"].append(
                        {"name": each["name"], "run": name, "step": drawn[-1], "place": place, "part": part}
                    )
    order = ("reference", "truth", "base", "drawn")
    for row in found.values():
        row["pictures"].sort(key=lambda each: order.index(each["name"]) if each["name"] in order else 0)
    return list(found.values())


class Measured(Ask):
    """A run and pairs that it has not seen."""

    run: str
    set: str
    count: int | None = None
    checkpoints: str = "best"


def evaluate(studio: Studio, ask: Measured) -> dict[str, str]:
    job = running.evaluate(studio.shelf, studio.jobs, ask.run, ask.set, ask.count, ask.checkpoints)
    return queued(studio, job)


def try_page(studio: Studio, request: Request) -> Response:
    """Drawing with what a run has learnt."""
    found = studio.runs.newest(studio.shelf.found().runs)
    run = asked(request, "run", "") or next((name for name in found if studio.runs.checkpoints(name)), "")
    checkpoints = studio.runs.checkpoints(run) if run else []
    earlier = [job for job in studio.jobs.all() if job.kind == "predict" and job.about["run"] == run]
    chosen = asked(request, "job", "")
    job = studio.jobs.of(chosen) if chosen else earlier[-1] if earlier else None
    steps = studio.runs.sample_steps(run) if run else []
    layout = studio.runs.layout(run, steps[-1]) if steps else []
    return studio.page(
        "try.html",
        run=run,
        runs=[name for name in found if studio.runs.checkpoints(name)],
        checkpoints=checkpoints,
        prompt=job.about["prompt"] if job else layout[0]["prompt"] if layout else "",
        job=None if job is None else about(studio, job) | {"cells": cells(job)},
        earlier=[{"id": each.id, "prompt": each.about["prompt"]} for each in reversed(earlier)][:12],
        sets=studio.shelf.found().data_sets,
        formats=FORMATS,
    )


def cells(job: Job) -> list[dict[str, Any]]:
    """The pictures of a grid; one that is not drawn yet has `ready` false."""
    listed: list[dict[str, Any]] = json.loads(job.about["cells"])
    return [{**cell, "ready": (job.folder / f"{place}.png").is_file()} for place, cell in enumerate(listed)]


def grid(studio: Studio, request: Request) -> Response:
    """How far a grid is."""
    job = studio.jobs.of(asked(request, "job"))
    return JSONResponse({"state": job.state, "cells": cells(job), "log": job.log(6_000)})


def drawn(studio: Studio, request: Request) -> Response:
    """A picture of a grid, or the one that it was drawn from."""
    job = studio.jobs.of(asked(request, "job"))
    path = job.folder / f"{number(request, 'place')}.png"
    if not path.is_file():
        raise Refused("not drawn yet", 404)
    return file(path, "image/png")


def tried(studio: Studio, request: Request) -> Response:
    """A picture that was dropped to be tried on."""
    path = dropped(studio, asked(request, "name"))
    return file(studio.thumbnails.kept(path, "640", lambda: small(path, 640)), "image/webp")


def dropped(studio: Studio, name: str) -> Path:
    """The file that `drop` has kept by a name."""
    path = studio.shelf.own / "tried" / name
    if not name.isalnum() or not path.is_file():
        raise Refused("there is no such picture", 404)
    return path


async def drop(request: Request) -> Response:
    """A picture, as the body of the request; answers with the name it is kept by."""
    studio: Studio = request.app.state.studio
    folder = studio.shelf.own / "tried"
    folder.mkdir(exist_ok=True)
    path = folder / secrets.token_hex(16)
    kept = False
    try:
        with open(path, "xb") as stored:
            async for chunk in bounded(request, uploads.LARGEST_PICTURE):
                await run_in_threadpool(stored.write, chunk)
        await run_in_threadpool(uploads.check_picture, path)
        kept = True
    finally:
        if not kept:
            path.unlink(missing_ok=True)
    return JSONResponse({"name": path.name})


class Wanted(Ask):
    """A grid of pictures."""

    run: str
    dropped: str | None = None  # name that `drop` has given
    picture: str | None = None  # or one of the folder
    prompt: str
    checkpoints: list[str]
    strengths: list[float]
    seed: int = 0
    steps: int | None = None


def draw(studio: Studio, ask: Wanted) -> dict[str, str]:
    if ask.dropped is not None:
        pictures = [dropped(studio, ask.dropped)]
    elif ask.picture is not None:
        pictures = [studio.shelf.picture(ask.picture)]
    else:
        raise Refused("drop a picture first, or choose one")
    job = running.draw(
        studio.shelf, studio.jobs, ask.run, pictures, ask.prompt, ask.checkpoints, ask.strengths, ask.seed, ask.steps
    )
    return queued(studio, job)


def download(studio: Studio, request: Request) -> Response:
    """The LoRA of a checkpoint, for another program."""
    run, checkpoint, kind = asked(request, "run"), asked(request, "checkpoint"), asked(request, "format", "diffusers")
    path = studio.shelf.run(run)
    weights = studio.runs.file(run, f"{checkpoint}/{versions.LORA_WEIGHTS}")
    if kind not in FORMATS or weights is None or not versions.CHECKPOINT.match(checkpoint):
        raise Refused("there is no such LoRA", 404)
    name = f"{path.parent.name}-{path.name}-step{versions.step_of(weights.parent)}-{kind}.safetensors"
    if kind != "diffusers":
        folder = studio.shelf.own / "exports"
        folder.mkdir(exist_ok=True)
        output = folder / f"{weights.stat().st_mtime_ns}-{name}"
        if not output.is_file():
            words = [str(weights), str(output), "--format", kind, "--family", family(studio, run)]
            verbs.run(studio.shelf, "export", words)
        weights = output
    return FileResponse(weights, media_type="application/octet-stream", filename=name)


class Wished(Ask):
    """A checkpoint of a run, and where it is to go."""

    run: str
    repository: str
    step: int
    public: bool = False
    pictures: bool = True

    @property
    def wish(self) -> pushing.Wish:
        return pushing.Wish(self.run, self.repository.strip(), self.step, self.public, self.pictures)


class Agreed(Wished):
    """The same, after a look."""

    shown: str


def show_push(studio: Studio, ask: Wished) -> dict[str, Any]:
    return pushing.show(studio.shelf, ask.wish)


def send_push(studio: Studio, ask: Agreed) -> dict[str, str]:
    return queued(studio, pushing.send(studio.shelf, studio.jobs, ask.wish, ask.shown))


def family(studio: Studio, run: str) -> str:
    """The family that a run has trained; it is written in its configuration, or its model says so."""
    settings = studio.runs.settings(run)
    trainer = settings.get("train.trainer")
    if isinstance(trainer, str) and trainer in FAMILIES:
        return trainer
    model = studio.shelf.inside(str(settings.get("model.pretrained_model_name_or_path", "-")))
    index = index_of(model)
    pipeline = None if index is None else json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    for name, entry in FAMILIES.items():
        if entry.pipeline == pipeline or entry.example == settings.get("model.pretrained_model_name_or_path"):
            return name
    raise Refused("which family this LoRA is of is not known: `qif export` in a terminal takes it by name")


ROUTES = [
    get("/compare", compare),
    post("/evaluate", Measured, evaluate),
    get("/try", try_page),
    get("/try/grid", grid),
    get("/try/drawn", drawn),
    get("/try/dropped", tried),
    Route("/try/drop", drop, methods=["POST"]),
    post("/try/draw", Wanted, draw),
    get("/download", download),
    post("/push/show", Wished, show_push),
    post("/push/send", Agreed, send_push),
]
