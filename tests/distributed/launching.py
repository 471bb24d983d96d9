"""Commands that start several processes on this machine, over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

Command = list[str]  # from `torchrun` or `accelerate` to the script: starts the processes of one machine


def one_machine(processes: int) -> list[Command]:
    return [["torchrun", "--standalone", "--nproc_per_node", str(processes)]]


def two_machines(processes: int) -> list[Command]:
    """Two torchruns that meet on the loopback, `processes` on each."""
    meeting = ["--nnodes", "2", "--nproc_per_node", str(processes), "--master_addr", "127.0.0.1",
               "--master_port", str(free_port())]  # fmt: skip
    return [["torchrun", *meeting, "--node_rank", str(rank)] for rank in range(2)]


def accelerated(file: str, processes: int, *more: str) -> Command:
    """Processes in all, under a launch configuration of the project."""
    return [
        "accelerate",
        "launch",
        "--config_file",
        f"configs/accelerate/{file}",
        "--num_processes",
        str(processes),
        *more,
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """That of this process, without what another launcher left in it."""
    strange = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        **more,
    }


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What a process said, once it has ended."""
    said, complained = process.communicate(timeout=280)
    return subprocess.CompletedProcess(process.args, process.returncode, said, complained)
