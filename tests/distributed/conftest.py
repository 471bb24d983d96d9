"""Starts of several processes on this machine, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
Launch = Callable[..., subprocess.CompletedProcess[str]]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


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


@pytest.fixture
def torchrun() -> Launch:
    """`torchrun(processes, "script.py" or "-m", ..., environment={...}, options=(...))`: output and exit code."""

    def launch(
        processes: int, *command: str, environment: Mapping[str, str] = {}, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        standalone = () if "--nnodes" in options else ("--standalone",)
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        return subprocess.run(
            [*start, *standalone, *options, *command], env=clean_environment(environment), capture_output=True,
            text=True, timeout=280, cwd=HERE.parent.parent, check=False,
        )  # fmt: skip

    return launch


@pytest.fixture
def run_all(torchrun: Launch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`run_all(processes, [task, ...], environment={...})`: results of the tasks, one list a process (see runs.py)."""

    def run(processes: int, tasks: list[dict[str, Any]], environment: Mapping[str, str] = {}) -> list[Any]:
        number = len(list(tmp_path.glob("tasks-*.json")))
        file = tmp_path / f"tasks-{number}-{processes}.json"
        file.write_text(json.dumps(tasks))
        done = torchrun(processes, str(HERE / "runs.py"), str(file), environment=environment)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
        return [json.loads(file.with_suffix(f".{rank}.json").read_text()) for rank in range(processes)]

    return run


@pytest.fixture
def task(configure: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`task(family, name, "section.key=value", ..., resume=..., do=...)`: a run of its own project, for `run_all`."""

    def build(family: str, name: str, *overrides: str, **more: Any) -> dict[str, Any]:
        configure(family)  # writes the file, which the next call overwrites
        file = tmp_path / f"config-{family}.yaml"
        shutil.copyfile(tmp_path / "config.yaml", file)
        project = f"logging.tracker_project_name={name}"
        return {"config": str(file), "overrides": [project, "train.collective_timeout=200", *overrides], **more}

    return build


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., Path]:
    """`alone(task, "section.key=value", ...)`: the same run in this one process, written elsewhere; its version."""

    def run(task: dict[str, Any], *more: str) -> Path:
        from outcomes import checkpoint

        from qwen_image_finetune.config import load_config
        from qwen_image_finetune.train import train

        resume = [f"train.resume_from_checkpoint={checkpoint(*task['resume'])}"] if "resume" in task else []
        elsewhere = f"logging.output_dir={tmp_path / 'alone'}"
        version = train(load_config(Path(task["config"]), [*task["overrides"], elsewhere, *resume, *more]))
        assert version is not None
        return version

    return run
