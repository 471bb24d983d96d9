"""`qif push`: a run on the hub, with a card made from what the run knows. Nothing leaves before it was shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from qwen_image_finetune.config.family import REPOSITORY
from qwen_image_finetune.disk.versions import HUB
from qwen_image_finetune.judging.model_card import CARD, prepare
from qwen_image_finetune.machine.console import say

TROUBLE = (HfHubHTTPError, OfflineModeIsEnabled, OSError)


class PushError(RuntimeError):
    """Nothing was sent, or not everything, and why."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    version: Path
    repository: str
    checkpoint: str = "best"
    pictures: bool = True
    public: bool = False
    yes: bool = False
    dry_run: bool = False


def push(request: Request) -> str | None:
    """Put together what is to be sent, show it, and send it once the person agrees; returns the page's address.

    Sent again after an interruption, what the hub has already is not sent twice.

    Raises:
        PushError: no hub id, no login, nobody to ask, a public repository that was not asked for, or the hub refuses.
        ReportError, EvaluationError: the folder is no run, or has no such checkpoint.
    """
    folder = gather(request)
    for line in shown(request, folder):
        say(line)
    if request.dry_run:
        return None
    api = logged_in()
    check_visibility(api, request)
    if not request.yes and not _agrees(request):
        say(f"nothing was sent; {folder} holds what would be")
        return None
    return send(api, request, folder)


def gather(request: Request) -> Path:
    """The folder of what is to be sent; it stays in the run, to be looked at."""
    if not REPOSITORY.fullmatch(request.repository):
        raise PushError(f"{request.repository!r} is no hub id: it takes OWNER/NAME, such as your-name/night")
    folder = request.version / HUB
    checkpoint = prepare(request.version, request.checkpoint, folder, request.repository, request.pictures)
    say(f"{checkpoint} -> {request.repository} ({'public' if request.public else 'private'})")
    return folder


def shown(request: Request, folder: Path) -> Iterator[str]:
    """The files with their sizes, and the card word for word."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield f"  {file.stat().st_size / 2**20:8.2f} MiB  {file.relative_to(folder)}"
    yield ""
    yield from (folder / CARD).read_text(encoding="utf-8").splitlines()
    yield ""
    if request.pictures and (folder / "samples").is_dir():
        yield "The pictures are of held-out pairs, and what was drawn of them; --no-pictures leaves them out."


def logged_in() -> HfApi:
    """The hub, with the token of this machine.

    Raises:
        PushError: there is none.
    """
    if get_token() is None:
        raise PushError("the hub knows nobody here: `hf auth login`, with a token that may write, then again")
    return HfApi(library_name="qwen-image-finetune")


def check_visibility(api: HfApi, request: Request) -> None:
    """Refuse to add a run to a page that everybody sees, unless that was asked for.

    Raises:
        PushError: the repository is public, or the hub does not answer.
    """
    try:
        found = api.repo_info(request.repository)
    except RepositoryNotFoundError:
        return
    except TROUBLE as error:
        raise PushError(f"the hub does not answer: {_short(error)}") from error
    if not found.private and not request.public:
        raise PushError(f"{request.repository} is public already: --public says that everybody may see this run too")


def send(api: HfApi, request: Request, folder: Path) -> str:
    """One commit with everything; returns the page's address.

    Raises:
        PushError: the hub refuses, or the connection is lost.
    """
    try:
        api.create_repo(request.repository, private=not request.public, exist_ok=True)
        api.upload_folder(
            repo_id=request.repository,
            folder_path=folder,
            commit_message=f"{request.version.resolve().name}, by qif push",
        )
    except TROUBLE as error:
        raise PushError(
            f"{request.repository} was not written: {_short(error)}. Push again: what has arrived is not sent twice"
        ) from error
    address = f"{api.endpoint}/{request.repository}"
    say(f"sent: {address}")
    return address


def _agrees(request: Request) -> bool:
    if not (sys.stdin and sys.stdin.isatty()):
        raise PushError("nobody is here to agree: look at the files above, then say --yes")
    kind = "for everybody to see" if request.public else "in private"
    return input(f"Send this to {request.repository}, {kind}? [y/N] ").strip().lower() in ("y", "yes")


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
