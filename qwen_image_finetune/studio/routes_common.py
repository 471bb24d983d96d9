"""What every address shares: the studio it speaks for, pages, and actions that take and give JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from qwen_image_finetune.machine.console import duration
from qwen_image_finetune.studio.bin import Bin
from qwen_image_finetune.studio.jobs import Job, Jobs
from qwen_image_finetune.studio.pairs import DataSets
from qwen_image_finetune.studio.queue import Queue
from qwen_image_finetune.studio.shelf import Refused, Shelf
from qwen_image_finetune.studio.thumbnails import Thumbnails
from qwen_image_finetune.studio.watching import Runs

LARGEST_BODY = 2 * 2**20  # bytes of JSON
Asked = TypeVar("Asked", bound="Ask")
DAY = "private, max-age=86400"


class Ask(BaseModel):
    """What an action is asked for; nothing else is taken."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True)
class Studio:
    """Everything that answers for one folder."""

    shelf: Shelf
    data: DataSets
    bin: Bin
    thumbnails: Thumbnails
    jobs: Jobs
    queue: Queue
    runs: Runs
    pages: Environment

    @classmethod
    def open(cls, folder: Path) -> Studio:
        """Raises Refused where there is no such folder."""
        shelf = Shelf(folder)
        shelf.own.mkdir(mode=0o700, exist_ok=True)
        jobs = Jobs(shelf)
        return cls(
            shelf, DataSets(shelf), Bin(shelf), Thumbnails(shelf), jobs, Queue(shelf, jobs), Runs(shelf), _environment()
        )

    def page(self, template: str, **values: Any) -> HTMLResponse:
        """A page, everything in it escaped."""
        waiting = len(self.bin.content()) if template in ("home.html", "data.html") else 0
        return HTMLResponse(self.pages.get_template(template).render(shelf=self.shelf, in_bin=waiting, **values))


def _environment() -> Environment:
    pages = Environment(
        loader=PackageLoader("qwen_image_finetune.studio", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["duration"] = duration
    pages.filters["count"] = lambda number, one, many: f"{number:,} {one if number == 1 else many}"
    return pages


def of(request: Request) -> Studio:
    """The studio that a request came to."""
    studio = request.app.state.studio
    assert isinstance(studio, Studio)
    return studio


def asked(request: Request, name: str, default: str | None = None) -> str:
    """A value of the address.

    Raises:
        Refused: it is missing.
    """
    value = request.query_params.get(name, default)
    if value is None:
        raise Refused(f"the address lacks {name}")
    return value


def number(request: Request, name: str, default: int = 0) -> int:
    """A whole number of the address, 0 or more."""
    text = asked(request, name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Refused(f"{name} is a number, not {text[:40]!r}")
    return int(text)


def get(path: str, answer: Callable[[Studio, Request], Response]) -> Route:
    """An address that shows something. It answers on a thread of its own, as it reads files."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(answer, of(request), request)

    return Route(path, endpoint, methods=["GET"], name=path)


def post(path: str, ask: type[Asked], act: Callable[[Studio, Asked], Any]) -> Route:
    """An address that changes something: JSON in, JSON out."""

    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused("JSON is taken here, nothing else", 415)
        body = bytearray()
        async for chunk in bounded(request, LARGEST_BODY):
            body += chunk
        try:
            wanted = ask.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise Refused(f"{'.'.join(map(str, first['loc'])) or 'the request'}: {first['msg']}") from error
        return JSONResponse(await run_in_threadpool(act, of(request), wanted))

    return Route(path, endpoint, methods=["POST"], name=path)


def address(job: Job) -> str:
    """Where to look at a job."""
    if job.kind == "predict":
        return "/try?" + urlencode({"run": job.about["run"], "job": job.id})
    if job.kind == "look":
        return "/data?" + urlencode({"set": job.about["set"]})
    return "/watch?" + urlencode({"job": job.id})


def queued(studio: Studio, job: Job) -> dict[str, str]:
    """What is answered once a job waits for its turn, which may be now."""
    studio.queue.tick()
    return {"job": job.id, "address": address(job)}


async def bounded(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body of a request.

    Raises:
        Refused: it is larger than `limit` bytes, whatever it says of itself.
    """
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise Refused(f"larger than {limit / 2**20:.0f} MiB", 413)
        yield chunk


def file(path: Path, kind: str, lasting: str = DAY, policy: str | None = None) -> FileResponse:
    """A file of the shelf; a browser runs nothing in it, whatever it holds."""
    headers = {"cache-control": lasting, "content-security-policy": policy or "default-src 'none'; sandbox"}
    return FileResponse(path, media_type=kind, headers=headers)
