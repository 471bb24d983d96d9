"""Two machines, each with its own launcher, that meet on the loopback: what one machine learns, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT, accelerated, clean_environment, ended, free_port, one_machine
from outcomes import losses, weights

from qwen_image_finetune.disk.history import ENVIRONMENT

Run = subprocess.Popen[str]

OPTIONS = ("train.max_train_steps=3", "train.checkpointing_steps=1")


def test_two_machines_equal_one(task: Callable[..., Any], run_all: Callable[..., Any]) -> None:
    """LoRA by data parallel, a LoRA over a shared base and a shared full fine-tune."""

    def tasks(place: str) -> list[dict[str, Any]]:
        return [
            task("QwenImageEdit", f"parallel-{place}", *OPTIONS, shared=False),
            task("FluxKontext", f"lora-{place}", *OPTIONS, shared=True),
            task("FluxKontext", f"full-{place}", *OPTIONS, "model.lora=null", shared=True),
        ]

    port = str(free_port())
    machines = [
        accelerated("two_machines.yaml", 2, "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                    "--main_process_port", port)
        for rank in range(2)
    ]  # fmt: skip
    far, near = (run_all(machines, tasks("two"))[0], run_all(one_machine(2), tasks("one"))[0])
    for ours, theirs in zip(far, near, strict=True):
        assert losses(ours["run"]) == losses(theirs["run"])
        expected = weights(theirs["run"])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours["run"]).items())
        assert ours["bytes"] == theirs["bytes"]


@pytest.fixture
def cluster(warm: Path, configure: Callable[..., Any], tmp_path: Path) -> Callable[..., Run]:
    """`cluster(script, environment)`: runs a shell script in a folder like the project's, on a machine of one card.

    `.venv/bin/torchrun` is there, and of Slurm `scontrol`, which names the machines, and `srun`, which does its
    command on both of them.
    """
    configure("FluxKontext")
    programs = {
        ".venv/bin/torchrun": f'exec {warm / "torchrun"} "$@"',
        "bin/scontrol": 'test "$*" = "show hostnames machine[1-2]" && echo 127.0.0.1 && echo machine2',
        "bin/srun": '"$@" & first=$!; "$@" && wait $first',
    }
    for name, text in programs.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def run(script: list[str], environment: dict[str, str]) -> Run:
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            script, env=clean_environment({**path, **environment}), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=tmp_path,
        )  # fmt: skip

    return run


def test_slurm(cluster: Callable[..., Run], tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_NODELIST": "machine[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1"}
    script = ["bash", str(ROOT / "configs/cluster/slurm.sh"), "config.yaml", *OPTIONS]
    expect_two_processes(ended(cluster(script, slurm)), tmp_path)


def test_skypilot(cluster: Callable[..., Run], tmp_path: Path) -> None:
    written = yaml.safe_load((ROOT / "configs/cluster/skypilot.yaml").read_text())
    given = {
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NUM_NODES": str(written["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "1", **written["envs"], "CONFIG": "config.yaml",
    }  # fmt: skip
    machines = [cluster(["bash", "-c", written["run"]], {**given, "SKYPILOT_NODE_RANK": str(rank)}) for rank in (1, 0)]
    for done in [ended(machine) for machine in machines]:
        expect_two_processes(done, tmp_path)


def expect_two_processes(done: Any, folder: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / "output/project").glob("v*")
    assert json.loads((run / ENVIRONMENT).read_text())["processes"] == 2
    assert len(losses(run)) in (3, 6)
