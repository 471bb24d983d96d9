"""`qif studio`: the page is served until Ctrl-C; what runs goes on."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path

import uvicorn

from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.locks import FileLock
from qwen_image_finetune.machine import console
from qwen_image_finetune.studio.app import application
from qwen_image_finetune.studio.guard import LOOPBACK
from qwen_image_finetune.studio.shelf import Refused, Shelf

TOKEN = "token"


def serve(folder: Path, host: str | None, port: int) -> None:
    """Serve the studio of a folder.

    Args:
        host: address that others reach it at; None: this machine alone.

    Raises:
        Refused: no such folder, or one that is open in another studio; a port that is taken.
    """
    if not 0 <= port < 65536:
        raise Refused(f"--port {port}: ports go from 0 to 65535")
    outside = host is not None and host not in LOOPBACK
    shelf = Shelf(folder)
    own = shelf.own
    own.mkdir(mode=0o700, exist_ok=True)
    try:
        lock = FileLock(own / "open", wait=False)
    except BlockingIOError:
        owner = (own / "open").read_text().strip()
        raise Refused(f"{folder} is open in another studio already ({owner})") from None
    token = kept_token(own / TOKEN) if outside else None
    app = application(folder, host if outside else None, token)
    listening = listen(host or "127.0.0.1", port)
    address = listening.getsockname()
    lock.write(f"process {os.getpid()}, port {address[1]}\n")
    os.chdir(shelf.root)  # paths in configurations are relative to it, as they will be for the runs
    shown = host if host and host not in ("0.0.0.0", "::") else socket.gethostname() if outside else "127.0.0.1"
    console.say(f"studio of {shelf.root}: http://{shown}:{address[1]}/" + (f"?token={token}" if token else ""))
    console.say("Ctrl-C closes the page; what runs goes on, and is found again.")
    sys.stdout.flush()
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # addresses may hold the token
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(settings).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        Refused: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
        listening.listen(256)
    except OSError as error:
        listening.close()
        raise Refused(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; --port takes another"
        ) from error
    return listening


def kept_token(path: Path) -> str:
    """The key of this folder's studio; the same after a restart, so that open pages stay open."""
    if not path.is_file():
        write_atomic(path, secrets.token_urlsafe(32))
        path.chmod(0o600)
    return path.read_text(encoding="utf-8").strip()
