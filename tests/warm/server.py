"""python, torchrun and accelerate launch, whose processes are forked from this one, which has imported everything.

    python server.py SOCKET PROCESS       ends with the process of that number

Rendezvous, agents, environments and restarts are those of the real commands; only the dozen seconds that each process
spends on imports are saved. A client (client.py) sends its command line, and its output streams with it; it is told the
exit code. A client that goes away takes what it started with it. Where WARM_PYTHON is set,
a command starts others by that instead of `sys.executable`.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.run
from accelerate.commands import launch as accelerate_launch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import qwen_image_finetune.command.cli
import qwen_image_finetune.training.job
import qwen_image_finetune.training.train  # noqa: F401  (each launch would import it)
from qwen_image_finetune import loading
from qwen_image_finetune.families import get_family


def load_once() -> None:
    """Load encoders of two families: what diffusers and transformers import and compile when they first do."""
    for name in ("FluxKontext", "QwenImageEdit"):
        with tempfile.TemporaryDirectory() as folder:
            get_family(name).tiny(Path(folder))
            loading.load_encoders(get_family(name), Path(folder), torch.float32, {"default": "cpu"})


def worker(*command: str) -> None:
    """What `python [-u] [-P] [-m] NAME ...` would do."""
    arguments = [argument for argument in command if argument not in ("-u", "-P")]
    sys.executable = os.environ.get("WARM_PYTHON", sys.executable)
    is_module = arguments[0] == "-m"
    torch.set_num_threads(1)  # makes torch's pool of threads, which a fork leaves behind, before threads of a run do
    sys.argv = arguments[is_module:]
    sys.path[:0] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    try:
        if is_module:
            sys.path[:0] = [] if "-P" in command else [os.getcwd()]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
        sys.stdout.flush()


def forking(config: LaunchConfig, entrypoint: str) -> Any:
    """In place of torchrun's `elastic_launch`, which would start the interpreter `entrypoint`."""
    config.start_method = "fork"
    return elastic_launch(config, worker)


def command(tool: str, arguments: list[str]) -> None:
    torch.distributed.run.elastic_launch = forking  # type: ignore[assignment]
    if tool == "python":
        worker(*arguments)
    elif tool == "torchrun":
        torch.distributed.run.main(arguments)
    else:  # accelerate launch ...
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(arguments[1:]))


def child(request: dict[str, Any], streams: list[int]) -> None:
    """Become the command; never returns."""
    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        command(request["tool"], request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def close(streams: Iterable[int]) -> None:
    for stream in streams:
        os.close(stream)


def receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, and the two streams that came with it.

    Raises OSError for a client that went away before all of it was said.
    """
    streams = array.array("i")
    message, ancillary, _, _ = client.recvmsg(1 << 20, socket.CMSG_SPACE(2 * streams.itemsize))
    for _, _, data in ancillary:
        streams.frombytes(data)
    while not message.endswith(b"\n"):
        more = client.recv(1 << 20)
        if not more:
            close(streams)
            raise ConnectionError("the client went away in the middle of its request")
        message += more
    return json.loads(message), list(streams)


def kill(process: int) -> None:
    """Kill a child and what it started; one that has not come as far as a group of its own has started nothing."""
    with suppress(ProcessLookupError):
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(process, signal.SIGKILL)


def main() -> None:
    load_once()
    # Else the collector of each child goes through all of this, and every page that it touches is copied.
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(sys.argv[1])
    listening.listen()
    running: dict[socket.socket, int] = {}
    while psutil.pid_exists(int(sys.argv[2])):
        ready, _, _ = select.select([listening, *running], [], [], 0.02)
        if listening in ready:
            client, _ = listening.accept()
            try:
                request, streams = receive(client)
            except OSError:  # it was killed before it had asked for anything
                client.close()
                continue
            running[client] = os.fork()
            if running[client] == 0:
                child(request, streams)
            close(streams)
        for client, process in list(running.items()):
            if client in ready:
                kill(process)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                with suppress(OSError):  # a client that went away does not ask
                    client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                client.close()
                del running[client]
    for process in running.values():
        kill(process)
    shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)
    os._exit(0)  # taking leave of all that was imported takes seconds


if __name__ == "__main__":
    main()
