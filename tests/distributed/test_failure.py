"""A process that is killed or hangs ends the run, says why, and torchrun's restart ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HERE
from outcomes import losses, weights

from qwen_image_finetune import runs

OPTIONS = ("train.max_train_steps=6", "train.checkpointing_steps=2", "train.resume_from_checkpoint=latest")


@pytest.fixture
def attempt(configure: Callable[..., Any], torchrun: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def run(fault: str, restarts: int, *more: str) -> Any:
        configure("FluxKontext")
        options = (f"--max_restarts={restarts}",)
        overrides = (*OPTIONS, f"logging.tracker_project_name={fault}", *more)
        return torchrun(2, str(HERE / "faulty.py"), str(tmp_path / "config.yaml"), fault, *overrides, options=options)

    return run


def test_restart_after_a_kill(attempt: Callable[..., Any], tmp_path: Path) -> None:
    assert attempt("none", 0).returncode == 0
    killed = attempt("killed", 1)
    assert killed.returncode == 0, killed.stdout + killed.stderr
    assert "exitcode: -9" in killed.stderr.replace(" ", "").replace("exitcode:", "exitcode: ")
    assert "at step 2" in killed.stdout
    whole, other = tmp_path / "output/none/v0", tmp_path / "output/killed/v0"
    assert losses(whole) == losses(other)
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(other).items())


@pytest.mark.parametrize("fault", ["hung", "stopped"])
def test_a_hung_process_is_named(fault: str, attempt: Callable[..., Any], tmp_path: Path) -> None:
    """Whether it still has a thread that speaks, or none at all."""
    hung = attempt(fault, 0, "train.collective_timeout=10")
    assert hung.returncode != 0
    assert "process 0 has waited" in hung.stdout, hung.stdout + hung.stderr
    assert "for process 1, " in hung.stdout
    if fault == "hung":
        assert "process 1 holds the others up" in hung.stdout and "threading.py" in hung.stderr
    project = tmp_path / "output" / fault
    found = runs.find_checkpoint(project, "latest", pytest.fail)
    assert found is not None and found.name.endswith("-2")
