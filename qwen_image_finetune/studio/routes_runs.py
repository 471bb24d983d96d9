"""Addresses of runs: the form, the queue, and watching."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.studio import form, running, verbs
from qwen_image_finetune.studio.jobs import Job
from qwen_image_finetune.studio.machine import machine
from qwen_image_finetune.studio.routes_common import Ask, Studio, address, asked, file, get, number, post, queued
from qwen_image_finetune.studio.shelf import Found, Refused
from qwen_image_finetune.studio.watching import Brief

NEWEST = 12  # runs on the first page
PAGE = 60  # runs on a page of all
PREVIEWS = 4  # pictures on the card of a data set
CARDS = ("8GB", "12GB", "16GB", "24GB", "32GB", "40GB", "48GB", "80GB", "96GB", "141GB")
RECENT = 3600.0  # seconds for which a job that failed is shown on the first page


def home(studio: Studio, request: Request) -> Response:
    """What there is: data sets, what runs and waits, the newest runs."""
    found = studio.shelf.found()
    jobs = studio.jobs.all()
    return studio.page(
        "home.html",
        sets=[card(studio, name) for name in found.data_sets],
        runs=[studio.runs.brief(name) for name in studio.runs.newest(found.runs)[:NEWEST]],
        num_runs=len(found.runs),
        now=[about(studio, job) for job in jobs if job.state == "running"],
        waiting=[about(studio, job) for job in studio.queue.waiting()],
        failed=[about(studio, job) for job in jobs if job.state in ("failed", "killed") and is_recent(job)],
        can_start=bool(found.data_sets),
    )


def all_runs(studio: Studio, request: Request) -> Response:
    """Every run, page by page."""
    names = studio.runs.newest(studio.shelf.found().runs)
    pages = max(-(-len(names) // PAGE), 1)
    page = min(max(number(request, "page", 1), 1), pages)
    shown = [studio.runs.brief(name) for name in names[(page - 1) * PAGE : page * PAGE]]
    return studio.page("runs.html", runs=shown, num_runs=len(names), page=page, pages=pages)


def is_recent(job: Job) -> bool:
    """Whether it ended not long ago."""
    return time.time() - (job.ended or job.started or job.created) < RECENT


def card(studio: Studio, name: str) -> dict[str, Any]:
    """A data set in a few words and pictures."""
    listing = studio.data.listing(name)
    rows = listing.rows
    chosen = [rows[place * len(rows) // PREVIEWS] for place in range(min(PREVIEWS, len(rows)))] if rows else []
    return {
        "name": name,
        "pairs": len(rows),
        "problems": len(listing.problems),
        "pictures": [studio.data.file(row, row.target_name) for row in chosen],
        "before": [studio.data.file(row, row.reference_names[0]) for row in chosen if row.reference_names],
    }


def about(studio: Studio, job: Job) -> dict[str, Any]:
    """A job, for a page."""
    run = studio.runs.of_job(job) if job.kind == "train" else job.about.get("run")
    brief: Brief | None = None
    if run is not None and job.kind == "train" and (studio.shelf.root / run).is_dir():
        brief = studio.runs.brief(run)
    return {"id": job.id, "kind": job.kind, "title": job.title, "state": job.state, "run": run, "brief": brief,
            "card": job.card, "address": address(job), "set": job.about.get("set")}  # fmt: skip


def new(studio: Studio, request: Request) -> Response:
    """The form of a run."""
    found = studio.shelf.found()
    source, data_set = asked(request, "from", ""), asked(request, "set", "")
    text = started_from(studio, source) if source else first_draft(studio, found, data_set)
    if source and data_set:
        text = form.edited(text, "data.init_args.dataset_path", data_set)
    knobs = form.knobs()
    hub = [entry.example for entry in FAMILIES.values()]
    return studio.page(
        "new.html",
        front=[knob for key in form.FRONT for knob in knobs if knob.key == key],
        others=sections([knob for knob in knobs if knob.key not in form.FRONT]),
        checked=form.check(text, studio.shelf).told(),
        models=[*found.models, *hub],
        sets=found.data_sets,
        configurations=found.configurations,
        cards=CARDS,
        source=source,
    )


def first_draft(studio: Studio, found: Found, data_set: str) -> str:
    """The text of a configuration for a data set, or for the first there is, with the first model there is."""
    data_set = data_set or next(iter(found.data_sets), "")
    model = next(iter(found.models), next(iter(FAMILIES.values())).example)
    return form.draft(model, data_set, data_set.rpartition("/")[2] or "my_run")


def started_from(studio: Studio, source: str) -> str:
    """The text of a configuration on the shelf, or of a run that is done again."""
    path = studio.shelf.inside(source)
    if path.is_dir():
        path = studio.shelf.inside(f"{source}/config.yaml")
    if path.suffix not in (".yaml", ".yml") or not path.is_file() or path.stat().st_size > form.LONGEST_DRAFT:
        raise Refused(f"{source} is no configuration")
    text = path.read_text(encoding="utf-8", errors="replace")
    return form.away_from_defaults(text) if path.name == "config.yaml" else text


def sections(knobs: list[form.Knob]) -> dict[str, list[form.Knob]]:
    """Keys by the first part of their name."""
    found: dict[str, list[form.Knob]] = {}
    for knob in knobs:
        found.setdefault(knob.key.partition(".")[0], []).append(knob)
    return found


class Draft(Ask):
    """A configuration, and perhaps a change of it."""

    yaml: str
    key: str | None = None
    value: str = ""


class Planned(Ask):
    """A configuration and the card it is planned for: its memory; empty for this machine's."""

    yaml: str
    card: str = ""


class Changes(Ask):
    """A configuration and new values of some of its keys, as the plan proposes them."""

    yaml: str
    keys: dict[str, Any]


def check(studio: Studio, ask: Draft) -> dict[str, Any]:
    """Answers with what the draft says, after the change."""
    text = ask.yaml if ask.key is None else form.edited(ask.yaml, ask.key, ask.value)
    return form.check(text, studio.shelf).told()


def change(studio: Studio, ask: Changes) -> dict[str, Any]:
    """Answers with what the draft says after several changes."""
    text = ask.yaml
    for key, value in ask.keys.items():
        text = form.edited(text, key, form.written(value))
    return form.check(text, studio.shelf).told()


def plan(studio: Studio, ask: Planned) -> dict[str, Any]:
    """Answers with what the run would take."""
    if ask.card not in ("", *CARDS):
        raise Refused(f"cards are known by their memory: {', '.join(CARDS)}")
    running.checked(studio.shelf, ask.yaml)
    folder = studio.shelf.own / "plans"
    folder.mkdir(exist_ok=True)
    path = folder / f"{time.time_ns()}.yaml"
    try:
        path.write_text(ask.yaml, encoding="utf-8")
        said = verbs.run(studio.shelf, "plan", [str(path), "--json", *(["--card", ask.card] if ask.card else [])])
    finally:
        path.unlink(missing_ok=True)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def start(studio: Studio, ask: Draft) -> dict[str, str]:
    """A run is queued."""
    return queued(studio, running.start(studio.shelf, studio.jobs, ask.yaml))


class JobAsked(Ask):
    """A job."""

    id: str
    places: int = 0


class RunAsked(Ask):
    """A run."""

    run: str


def stop(studio: Studio, ask: JobAsked) -> dict[str, str]:
    """It is asked to end, and saves first."""
    job = studio.jobs.of(ask.id)
    job.stop()
    return {"state": job.state}


def move(studio: Studio, ask: JobAsked) -> dict[str, bool]:
    studio.queue.move(ask.id, ask.places)
    return {"moved": True}


def withdraw(studio: Studio, ask: JobAsked) -> dict[str, bool]:
    studio.queue.withdraw(ask.id)
    return {"gone": True}


def go_on(studio: Studio, ask: RunAsked) -> dict[str, str]:
    return queued(studio, running.go_on(studio.shelf, studio.jobs, ask.run))


def watch(studio: Studio, request: Request) -> Response:
    """A run, or a job that has not become one yet."""
    identity, run = asked(request, "job", ""), asked(request, "run", "")
    job = studio.jobs.of(identity) if identity else job_of(studio, run)
    if job is not None and job.kind == "predict":
        return RedirectResponse(address(job), 303)
    if job is not None and not run:
        run = (studio.runs.of_job(job) if job.kind == "train" else job.about.get("run")) or ""
    if not run and job is None:
        raise Refused("there is no such run", 404)
    settings = studio.runs.settings(run) if run else {}
    return studio.page(
        "watch.html",
        run=run,
        job=None if job is None else about(studio, job),
        title="/".join(run.split("/")[-2:]) if run else job.title if job else "",
        settings=settings,
        changed=form.changed_settings(settings),
        pairs=studio.runs.pairs(run) if settings else None,
        evaluation=studio.runs.evaluation(run) if run else {},
        held_out=len(studio.runs.held_out(run)) if run else 0,
        sets=studio.shelf.found().data_sets,
        family=settings.get("train.trainer") or "",
    )


def job_of(studio: Studio, run: str) -> Job | None:
    """The newest job that has trained a run; None for one that was started in a terminal."""
    studio.shelf.run(run)
    found = [job for job in studio.jobs.all() if job.kind == "train" and studio.runs.of_job(job) == run]
    return found[-1] if found else None


def live(studio: Studio, request: Request) -> Response:
    """How it stands; asked every other second."""
    identity, run = asked(request, "job", ""), asked(request, "run", "")
    told: dict[str, Any] = {"job": None, "log": "", "run": run, "machine": machine()}
    if identity:
        job = studio.jobs.of(identity)
        told |= {"job": job.state, "log": job.log()}
        if not run and job.kind == "train":
            told["run"] = run = studio.runs.of_job(job) or ""
    if run and not told["log"]:  # of a run that was started in a terminal
        told["log"] = studio.runs.log(run)
    if run:
        told |= studio.runs.live(run, number(request, "offset"))
    return JSONResponse(told)


def sample(studio: Studio, request: Request) -> Response:
    """A picture that was drawn while training."""
    run, step = asked(request, "run"), number(request, "step")
    place, part = number(request, "place"), number(request, "part")
    return part_of_sample(studio, run, step, place, part)


def part_of_sample(studio: Studio, run: str, step: int, place: int, part: int) -> Response:
    path = studio.runs.file(run, f"samples/step-{step}/{place}.png")
    if path is None:
        raise Refused("there is no such sample", 404)
    cut = studio.thumbnails.kept(path, f"part {part}", lambda: studio.runs.sample(run, step, place, part))
    return file(cut, "image/webp")


def strip(studio: Studio, request: Request) -> Response:
    """A part of the first sample of a step, for the card of a run."""
    run, step = asked(request, "run"), number(request, "step")
    layout = studio.runs.layout(run, step)
    parts = [part["name"] for part in layout[0]["parts"]] if layout else []
    wanted = asked(request, "part", "drawn")
    return part_of_sample(studio, run, step, 0, parts.index(wanted) if wanted in parts else 0)


def queue_state(studio: Studio, request: Request) -> Response:
    """What runs and waits, for a page that wants to know whether that has changed."""
    told = []
    for job in studio.jobs.all():
        if job.state in ("running", "waiting"):
            brief = about(studio, job)["brief"]
            told.append({"id": job.id, "state": job.state, "step": None if brief is None else brief.step,
                         "total": None if brief is None else brief.total,
                         "seconds_left": None if brief is None else brief.seconds_left})  # fmt: skip
    return JSONResponse({"jobs": told, "machine": machine()})


def report(studio: Studio, request: Request) -> Response:
    """The page of a run in one file; made when it is asked for."""
    run = asked(request, "run")
    path = studio.shelf.sealed(studio.shelf.run(run))
    folder = studio.shelf.own / "reports"
    folder.mkdir(exist_ok=True)
    page = folder / f"{run.replace('/', '--')[-150:]}.html"
    verbs.run(studio.shelf, "report", [str(path), "--output", str(page)])
    return served_report(page)


def served_report(page: Path) -> Response:
    """A page that was made of what lies in a folder: it may run its own script, and reach nothing with it."""
    inline = "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    policy = f"default-src 'none'; {inline}; sandbox allow-scripts"
    return file(page, "text/html; charset=utf-8", lasting="no-store", policy=policy)


ROUTES = [
    get("/", home),
    get("/runs", all_runs),
    get("/new", new),
    post("/new/check", Draft, check),
    post("/new/change", Changes, change),
    post("/new/plan", Planned, plan),
    post("/new/start", Draft, start),
    post("/queue/stop", JobAsked, stop),
    post("/queue/move", JobAsked, move),
    post("/queue/withdraw", JobAsked, withdraw),
    post("/queue/continue", RunAsked, go_on),
    get("/queue", queue_state),
    get("/watch", watch),
    get("/watch/live", live),
    get("/watch/sample", sample),
    get("/watch/strip", strip),
    get("/report", report),
]
