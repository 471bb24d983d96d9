"""The application: every address, what is said when something is refused, and the queue's clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from qwen_image_finetune.disk.files import DiskFull, is_disk_full
from qwen_image_finetune.disk.reading import Unreadable
from qwen_image_finetune.disk.versions import RunError
from qwen_image_finetune.judging import pages
from qwen_image_finetune.machine import console
from qwen_image_finetune.studio import routes_data, routes_judging, routes_runs
from qwen_image_finetune.studio.guard import Guard
from qwen_image_finetune.studio.routes_common import Studio
from qwen_image_finetune.studio.shelf import Refused

SECONDS_BETWEEN_TICKS = 1.0
STATIC = Path(__file__).parent / "static"
PAGES = Path(pages.__file__).parent
SHARED = ("look.css", "charts.js")  # with the pages about runs


def _shared(name: str) -> Callable[[Request], Response]:
    file = PAGES / name
    return lambda request: FileResponse(file)


def application(folder: Path, host: str | None = None, token: str | None = None, starts_jobs: bool = True) -> Starlette:
    """The studio of a folder.

    Args:
        host, token: as for `Guard`.
        starts_jobs: let what waits in the queue begin.

    Raises:
        Refused: there is no such folder.
    """
    studio = Studio.open(folder)

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        clock = asyncio.create_task(_tick(studio)) if starts_jobs else None
        yield
        if clock is not None:
            clock.cancel()

    app = Starlette(
        routes=[
            *routes_runs.ROUTES,
            *routes_data.ROUTES,
            *routes_judging.ROUTES,
            *(Route(f"/static/{name}", _shared(name)) for name in SHARED),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, host=host, token=token)],
        exception_handlers={
            Refused: _refused,
            HTTPException: _missing,
            OSError: _unwritten,
            RunError: _damaged,
            Unreadable: _damaged,
        },
        lifespan=life,
    )
    app.state.studio = studio
    return app


async def _tick(studio: Studio) -> None:
    said = ""
    while True:
        try:
            await run_in_threadpool(studio.queue.tick)
        except OSError as error:  # a full disk, say: the queue goes on once there is room
            if str(error) != said:
                said = str(error)
                console.say(f"the queue cannot go on for now: {error}")
        await asyncio.sleep(SECONDS_BETWEEN_TICKS)


def _said(request: Request, words: str, status: int) -> Response:
    if request.method == "POST":
        return JSONResponse({"error": words}, status)
    if "text/html" in request.headers.get("accept", ""):
        studio: Studio = request.app.state.studio
        page = studio.page("refused.html", words=words)
        page.status_code = status
        return page
    return PlainTextResponse(words, status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _said(request, str(error), error.status)


async def _missing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _said(
        request, "There is nothing at this address." if error.status_code == 404 else error.detail, error.status_code
    )


async def _damaged(request: Request, error: Exception) -> Response:
    return _said(request, str(error), 422)


async def _unwritten(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if is_disk_full(error):
        return _said(request, str(error) if isinstance(error, DiskFull) else "no space left on this disk", 507)
    return _said(request, f"{error.filename or 'a file'}: {error.strerror or error}", 500)
