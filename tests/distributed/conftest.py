"""Starts of several processes on this machine, over gloo."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from launching import HERE, ROOT, Command, clean_environment, ended

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(warm: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start("torchrun" or "accelerate", argument, ..., environment={...})`: the process, which may still run."""
    started: list[subprocess.Popen[str]] = []

    def run(tool: str, *arguments: str, environment: Mapping[str, str] = {}) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [str(warm / tool), *arguments], env=clean_environment(environment), stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, cwd=ROOT,
            )
        )  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def torchrun(start: Callable[..., subprocess.Popen[str]]) -> Launch:
    """`torchrun(processes, "script.py" or "-m", ..., environment={...}, options=(...))`: output and exit code."""

    def launch(
        processes: int, *command: str, environment: Mapping[str, str] = {}, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        process = start("torchrun", "--standalone", "--nproc_per_node", str(processes), *options, *command,
                        environment=environment)  # fmt: skip
        return ended(process)

    return launch


@pytest.fixture
def run_all(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`run_all([command, ...], [task, ...])`: results of the tasks, one list a process (see runs.py).

    Each command is that of one machine.
    """

    def run(commands: list[Command], tasks: list[dict[str, Any]]) -> list[Any]:
        number = len(list(tmp_path.glob("tasks-*")))
        folder = tmp_path / f"tasks-{number}"
        folder.mkdir()
        file = folder / "tasks.json"
        file.write_text(json.dumps(tasks))
        machines = [start(*command, str(HERE / "runs.py"), str(file)) for command in commands]
        for done in [ended(machine) for machine in machines]:
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
            assert "find_unused_parameters" not in done.stderr
        results = {int(path.suffixes[0][1:]): json.loads(path.read_text()) for path in folder.glob("tasks.*.json")}
        return [results[rank] for rank in range(len(results))]

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
        from qwen_image_finetune.training.train import train

        resume = [f"train.resume_from_checkpoint={checkpoint(*task['resume'])}"] if "resume" in task else []
        elsewhere = f"logging.output_dir={tmp_path / 'alone'}"
        version = train(load_config(Path(task["config"]), [*task["overrides"], elsewhere, *resume, *more]))
        assert version is not None
        return version

    return run
