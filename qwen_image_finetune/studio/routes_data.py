"""Addresses of data sets: looking at pairs, editing captions, taking pictures in, throwing them away."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Literal, cast

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.data.sources import REFERENCES, TARGETS
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.studio import captioning, looking, uploads
from qwen_image_finetune.studio.inbox import Inbox
from qwen_image_finetune.studio.jobs import Step
from qwen_image_finetune.studio.pairs import Change
from qwen_image_finetune.studio.routes_common import Ask, Studio, asked, bounded, file, get, number, post, queued
from qwen_image_finetune.studio.shelf import Refused
from qwen_image_finetune.studio.thumbnails import small

PAGE = 48  # pairs on one
KINDS = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
MOST_RUNS = 40  # that are asked for the pairs they keep aside
MOST_SHOWN = 200  # captions in a preview, problems, orphans


def data_page(studio: Studio, request: Request) -> Response:
    """A data set as a grid of pairs."""
    name, chosen, wanted = asked(request, "set"), asked(request, "only", ""), asked(request, "search", "").strip()
    listing, notes = studio.data.listing(name), looking.read_notes(studio.shelf, name)
    rows = [row for row in listing.rows if not chosen or chosen in notes.of(row.key)]
    if wanted:
        words = wanted.casefold()
        rows = [r for r in rows if words in r.key.casefold() or words in studio.data.caption(r).casefold()]
    pages = max(-(-len(rows) // PAGE), 1)
    page = min(number(request, "page", 1), pages)
    aside, proposals = kept_aside(studio, name), captioning.read_proposals(studio.shelf, name)
    orphans, waiting = studio.data.orphans(name), Inbox(studio.shelf, name).waiting()
    return studio.page(
        "data.html",
        name=name,
        total=len(listing.rows),
        found=len(rows),
        pairs=[seen(studio, name, row, notes) for row in rows[(page - 1) * PAGE : page * PAGE]],
        aside=aside,
        proposals=proposals,
        page=page,
        pages=pages,
        only=chosen,
        search=wanted,
        problems=list(listing.problems[:MOST_SHOWN]),
        more_problems=max(len(listing.problems) - MOST_SHOWN, 0),
        orphans=orphans,
        counts=notes.counts(),
        looked=notes.done,
        words=looking.WORDS,
        looking=is_looking(studio, name),
        waiting=waiting[:MOST_SHOWN],
        num_waiting=len(waiting),
        ready=sum(each.after is not None and bool(each.before) for each in waiting),
    )


def kept_aside(studio: Studio, name: str) -> set[str]:
    """Keys of the pairs that the newest run of this set does not learn from, so that it can be measured on them."""
    for run in studio.runs.newest(studio.shelf.found().runs)[:MOST_RUNS]:
        settings = studio.runs.settings(run)
        if settings.get("data.init_args.dataset_path") == name:
            elsewhere = settings.get("validation.dataset_path") is not None  # pairs of another folder
            return set() if elsewhere else studio.runs.held_out(run)
    return set()


def seen(studio: Studio, name: str, row: Row, notes: looking.Notes) -> dict[str, Any]:
    """A pair, for the page."""
    return {
        "key": row.key,
        "target": studio.data.file(row, row.target_name),
        "references": [studio.data.file(row, each) for each in row.reference_names],
        "mask": None if row.mask_name is None else studio.data.file(row, row.mask_name),
        "caption": studio.data.caption(row),
        "notes": notes.of(row.key),
        "set": name,
    }


def thumbnail(studio: Studio, request: Request) -> Response:
    """A small version of a picture."""
    return file(studio.thumbnails.of(asked(request, "picture"), number(request, "side", 320)), "image/webp")


def picture(studio: Studio, request: Request) -> Response:
    """A picture as it is."""
    path = studio.shelf.picture(asked(request, "picture"))
    return file(path, KINDS[path.suffix.lower()], lasting="no-cache")


def inbox_picture(studio: Studio, request: Request) -> Response:
    """A small version of a picture that waits in an inbox."""
    path = Inbox(studio.shelf, asked(request, "set")).picture(asked(request, "side"), asked(request, "name"))
    return file(studio.thumbnails.kept(path, "inbox", lambda: small(path, 320)), "image/webp", lasting="no-cache")


class Caption(Ask):
    """A caption, edited in place."""

    set: str
    key: str
    before: str
    after: str


def write_caption(studio: Studio, ask: Caption) -> dict[str, str]:
    """Answers with the caption as it is stored now."""
    studio.data.write_caption(ask.set, ask.key, ask.before, ask.after)
    return {"caption": studio.data.caption(studio.data.row(ask.set, ask.key))}


class Captions(Ask):
    """Many captions at once; all of the set where no keys are given."""

    set: str
    keys: list[str] = Field(default_factory=list)
    find: str = ""
    replace: str = ""
    prefix: str = ""
    suffix: str = ""
    write: bool = False  # otherwise it is only shown what would change


def change_captions(studio: Studio, ask: Captions) -> dict[str, Any]:
    """Answers with what changes, or has changed."""
    change = Change(ask.find, ask.replace, ask.prefix, ask.suffix)
    rows: Sequence[Row] = studio.data.listing(ask.set).rows
    if ask.keys:
        rows = [row for row in rows if row.key in set(ask.keys)]
    if ask.write:
        return {"changed": studio.data.rewrite(ask.set, [row.key for row in rows], change)}
    changes = [
        (row.key, before, after) for row in rows if (after := change.of(before := studio.data.caption(row))) != before
    ]
    shown = [{"key": key, "before": before, "after": after} for key, before, after in changes[:MOST_SHOWN]]
    return {"changes": len(changes), "shown": shown}


class Keys(Ask):
    """Pairs of a data set."""

    set: str
    keys: list[str]


def throw_away(studio: Studio, ask: Keys) -> dict[str, Any]:
    """Pairs go to the bin."""
    thrown = [studio.bin.throw_pair(studio.data.row(ask.set, key), ask.set) for key in ask.keys]
    return {"thrown": thrown}


class Identity(Ask):
    """Something by its name."""

    id: str


class Nothing(Ask):
    """Nothing has to be said."""


def bin_page(studio: Studio, request: Request) -> Response:
    """What was thrown away."""
    return studio.page("bin.html", content=studio.bin.content())


class Halves(Ask):
    """A reference and a target that belong together: their names, or in an inbox their stems."""

    set: str
    before: str
    after: str


def join(studio: Studio, ask: Halves) -> dict[str, str]:
    """A picture before the edit is renamed to fit the one after it."""
    return {"name": studio.data.join(ask.set, ask.before, ask.after)}


class WriteEmpty(Ask):
    """Pictures without a caption get one."""

    set: str
    caption: str


def add_captions(studio: Studio, ask: WriteEmpty) -> dict[str, int]:
    """A caption file beside every picture that has none."""
    names = studio.data.orphans(ask.set).uncaptioned
    for name in names:
        path = studio.shelf.inside(name).with_suffix(".txt")
        if not path.exists():
            write_atomic(path, ask.caption.strip() + "\n")
    return {"written": len(names)}


class NewSet(Ask):
    """A data set that is not there yet."""

    name: str


def new_set(studio: Studio, ask: NewSet) -> dict[str, str]:
    """An empty data set."""
    folder = studio.shelf.inside("/".join(uploads.clean_stem(part) for part in ask.name.split("/") if part.strip()))
    if folder.exists():
        raise Refused(f"there is a folder {studio.shelf.name(folder)} already")
    for side in (TARGETS, REFERENCES):
        (folder / side).mkdir(parents=True)
    return {"set": studio.shelf.name(folder)}


async def upload(request: Request) -> Response:
    """One file, as the body of the request; it waits in the inbox of the data set."""
    studio: Studio = request.app.state.studio
    name, side = asked(request, "name"), asked(request, "side", "")
    if side not in ("", "before", "after") or not name or len(name) > 1000:
        raise Refused("side is before, after or empty, and a file has a name")
    inbox = await run_in_threadpool(Inbox, studio.shelf, asked(request, "set"))
    is_zip = name.lower().endswith(".zip")
    folder = studio.shelf.own / "arriving"
    folder.mkdir(exist_ok=True)
    path = folder / secrets.token_hex(8)
    try:
        with open(path, "xb") as stored:
            async for chunk in bounded(request, uploads.LARGEST_ZIP if is_zip else uploads.LARGEST_PICTURE):
                await run_in_threadpool(stored.write, chunk)
        received = await run_in_threadpool(inbox.receive, name, path, cast("uploads.Side | None", side or None))
    finally:
        path.unlink(missing_ok=True)
    return JSONResponse({"taken": received.taken, "refused": received.refused[:MOST_SHOWN]})


class Accept(Ask):
    """What is whole in the inbox becomes part of the data set."""

    set: str
    caption: str = ""


class Named(Ask):
    """A data set."""

    set: str


def join_inbox(studio: Studio, ask: Halves) -> dict[str, bool]:
    Inbox(studio.shelf, ask.set).join(ask.before, ask.after)
    return {"joined": True}


def accept(studio: Studio, ask: Accept) -> dict[str, int]:
    return {"added": Inbox(studio.shelf, ask.set).accept(ask.caption)}


def clear(studio: Studio, ask: Named) -> dict[str, bool]:
    Inbox(studio.shelf, ask.set).clear()
    return {"cleared": True}


def look(studio: Studio, ask: Named) -> dict[str, str]:
    """Have a data set looked through."""
    folder = studio.shelf.sealed(studio.shelf.folder(ask.set))
    arguments = [str(studio.shelf.root), studio.shelf.name(folder)]
    job = studio.jobs.add("look", f"Look through {ask.set}", [Step("look", arguments)], about={"set": ask.set})
    return {"job": job.id}


class Proposed(Ask):
    """A data set, and the model that proposes captions for it."""

    set: str
    model: str
    which: Literal["empty", "all"] = "empty"


def propose(studio: Studio, ask: Proposed) -> dict[str, str]:
    """Have captions proposed; none is written."""
    folder = studio.shelf.sealed(studio.shelf.folder(ask.set))
    place = captioning.model_place(studio.shelf, ask.model)
    arguments = [str(studio.shelf.root), studio.shelf.name(folder), place, ask.which]
    job = studio.jobs.add(
        "caption", f"Propose captions for {ask.set}", [Step("caption", arguments)], True, about={"set": ask.set}
    )
    return queued(studio, job)


def looked(studio: Studio, request: Request) -> Response:
    """How far it is."""
    name = asked(request, "set")
    studio.shelf.folder(name)
    notes = looking.read_notes(studio.shelf, name)
    told = {"going": is_looking(studio, name), "done": notes.done, "total": notes.total, "counts": notes.counts()}
    return JSONResponse(told)


def is_looking(studio: Studio, name: str) -> bool:
    """Whether a data set is being looked through, or waits for it."""
    jobs = [job for job in studio.jobs.all() if job.kind == "look" and job.about.get("set") == name]
    return bool(jobs) and jobs[-1].state in ("waiting", "running")


ROUTES = [
    get("/data", data_page),
    get("/thumbnail", thumbnail),
    get("/picture", picture),
    get("/inbox/picture", inbox_picture),
    get("/bin", bin_page),
    get("/data/looked", looked),
    post("/data/new", NewSet, new_set),
    post("/data/caption", Caption, write_caption),
    post("/data/captions", Captions, change_captions),
    post("/data/throw", Keys, throw_away),
    post("/data/join", Halves, join),
    post("/data/add-captions", WriteEmpty, add_captions),
    post("/data/look", Named, look),
    post("/data/propose", Proposed, propose),
    Route("/inbox/upload", upload, methods=["POST"]),
    post("/inbox/join", Halves, join_inbox),
    post("/inbox/accept", Accept, accept),
    post("/inbox/clear", Named, clear),
    post("/bin/restore", Identity, lambda studio, ask: {"title": studio.bin.restore(ask.id).title}),
    post("/bin/empty", Nothing, lambda studio, ask: {"emptied": studio.bin.empty()}),
]
