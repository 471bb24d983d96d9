"""A process that is killed or hangs ends the run, says why, and torchrun's restart ends as if nothing had happened."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import HERE, ended, free_port, one_machine
from outcomes import losses, weights

from qwen_image_finetune.disk import versions

OPTIONS = ("train.max_train_steps=6", "train.checkpointing_steps=2", "train.resume_from_checkpoint=latest")


@pytest.fixture
def attempt(configure: Callable[..., Any], torchrun: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def run(fault: str, restarts: int, *more: str) -> Any:
        configure("FluxKontext")
        options = (f"--max_restarts={restarts}",)
        overrides = (*OPTIONS, f"logging.tracker_project_name={fault}", *more)
        return torchrun(2, str(HERE / "faulty.py"), str(tmp_path / "config.yaml"), fault, *overrides, options=options)

    return run


def layouts() -> dict[str, list[list[str]]]:
    """Ways to start two processes: the commands, one a machine."""
    port = str(free_port())
    meetings = {
        "static": ["--master_addr", "127.0.0.1", "--master_port", port],
        "c10d": ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "run"],
    }
    two = {
        name: [["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *meeting, "--node_rank", str(rank)]
               for rank in range(2)]
        for name, meeting in meetings.items()
    }  # fmt: skip
    return {"one machine": one_machine(2), **two}


def test_restart_after_a_kill(attempt: Callable[..., Any], start: Callable[..., Any], tmp_path: Path) -> None:
    """One process is killed, on one machine or on one of two: all start again, and end with the same bits."""
    whole = tmp_path / "output/none/v0"
    assert attempt("none", 0).returncode == 0
    for number, (name, commands) in enumerate(layouts().items()):
        run = [str(HERE / "faulty.py"), str(tmp_path / "config.yaml"), "killed", *OPTIONS]
        project = f"logging.tracker_project_name=killed-{number}"
        machines = [start(*command, "--max_restarts=1", *run, project) for command in commands]
        outcomes = [ended(machine) for machine in machines]
        said, complained = ("".join(getattr(done, kind) for done in outcomes) for kind in ("stdout", "stderr"))
        assert [done.returncode for done in outcomes] == [0] * len(machines), said + complained
        # torchrun tells of one failed process alone, which may be the one that lost its peer.
        assert said.count("process 1 is killed") == 1 and "at step 2" in said, name
        other = tmp_path / f"output/killed-{number}/v0"
        assert losses(whole) == losses(other), name
        assert all(torch.equal(weights(whole)[key], tensor) for key, tensor in weights(other).items()), name


def test_a_machine_is_lost(configure: Callable[..., Any], start: Callable[..., Any], tmp_path: Path) -> None:
    """Its launcher and its processes gone at once, as by a loss of power: the other ends, and says why."""
    configure("FluxKontext")
    # Few checkpoints: lost while the other waits for it to save, and not in a step, it would be waited for.
    overrides = ("train.max_train_steps=100000", "train.checkpointing_steps=20", "train.collective_timeout=20")
    run = ["-m", "qwen_image_finetune.cli", "train", str(tmp_path / "config.yaml"), *overrides]
    first, second = (start(*command, *run) for command in layouts()["static"])
    project = tmp_path / "output/project"
    while versions.find_checkpoint(project, "latest", lambda message: None) is None:
        assert first.poll() is None, ended(first)
        time.sleep(0.1)
    second.kill()  # and the server all that it had started
    done = ended(first)
    assert done.returncode != 0
    assert re.search(r"[Cc]onnection (closed|reset)|Broken pipe", done.stderr), done.stdout + done.stderr
    found = versions.find_checkpoint(project, "latest", pytest.fail)
    assert found is not None


def test_a_hung_process_is_named(configure: Callable[..., Any], start: Callable[..., Any], tmp_path: Path) -> None:
    """Whether it still has a thread that speaks, or none at all. Both wait out the same seconds."""
    configure("FluxKontext")
    waiting = {}
    for fault in ("hung", "stopped"):
        run = [str(HERE / "faulty.py"), str(tmp_path / "config.yaml"), fault, *OPTIONS]
        more = (f"logging.tracker_project_name={fault}", "train.collective_timeout=20")  # said after 14 s
        waiting[fault] = start(*one_machine(2)[0], *run, *more)
    for fault, process in waiting.items():
        hung = ended(process)
        assert hung.returncode != 0
        assert "process 0 has waited" in hung.stdout, hung.stdout + hung.stderr
        assert "for process 1, " in hung.stdout
        if fault == "hung":
            assert "process 1 holds the others up" in hung.stdout and "threading.py" in hung.stderr
        found = versions.find_checkpoint(tmp_path / "output" / fault, "latest", pytest.fail)
        assert found is not None and found.name.endswith("-2")
