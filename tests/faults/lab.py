"""Whole runs of very small models in processes of their own, started in a moment, that tests may kill.

A server process imports everything once and forks a child for each run, so that a run costs a fraction of a second
instead of ten. The child is a real process in every other way: it runs `qif` as a person would, gets real signals and
reports, if asked to, through a pipe when it begins to save, to cache or to draw.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

FULL = os.environ.get("QIF_FAULTS") == "full"
FAMILIES = ("FluxKontext", "QwenImageEdit")
KILLED = -signal.SIGKILL
MEASURED = ("step_seconds", "data_seconds", "memory_gib")  # differ from one run to the next
STATE_FILES = ("adapter.safetensors", "optimizer.json", "optimizer.safetensors", "schedule.json", "progress.json")


def full_or(full: int, few: int) -> int:
    """A count of the documentation, or one that fits continuous integration."""
    return full if FULL else few


def record(row: str, tried: int, lost: Sequence[object], note: str = "") -> None:
    """One line of the table that `make faults` prints; fails where anything was lost."""
    target = os.environ.get("QIF_FAULTS_REPORT")
    if target:
        line = {"row": row, "tried": tried, "survived": tried - len(lost), "lost": len(lost), "note": note}
        with open(target, "a") as file:
            file.write(json.dumps(line) + "\n")
    assert not lost, f"{row}: {len(lost)} of {tried} lost; the first: {lost[0]}"


# What is trained


def write_small_checkpoint(family: str, folder: Path) -> None:
    """A tiny checkpoint whose transformer is smaller still: one block of width 16, a millisecond or two a pass."""
    import torch
    from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

    from qwen_image_finetune.families import get_family

    get_family(family).tiny(folder)
    torch.manual_seed(0)
    same = {
        "in_channels": 64, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1,
        "joint_attention_dim": 64, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    if family == "FluxKontext":
        transformer = FluxTransformer2DModel(
            num_single_layers=1, pooled_projection_dim=32, guidance_embeds=True, **same
        )
    else:
        transformer = QwenImageTransformer2DModel(out_channels=16, **same)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")


def write_pairs(folder: Path, count: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for name in ("control_images", "training_images"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            cells = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(cells).resize((32, 32), Image.Resampling.BICUBIC).save(folder / name / f"{index}.png")
    for index in range(count):
        (folder / "training_images" / f"{index}.txt").write_text(f"edit number {index}")
    return folder


# Runs


@dataclass
class Trial:
    """A process that runs, or ran, `qif`."""

    process: ForkServerProcess
    log: Path
    phases: Connection | None

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 200) -> int:
        """The exit code; -N after signal N. A process that hangs is ended and fails the test."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless the process is gone already."""
        if self.process.exitcode is None:
            os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.process.join()

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def await_phase(self, name: str, count: int = 1, seconds: float = 100) -> bool:
        """Wait until the process has entered a phase `count` times; False where it ended before."""
        assert self.phases is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.phases.poll(0.05) and self.phases.recv() == name:
                    count -= 1
                    if count == 0:
                        return True
            except EOFError:
                return False
            if self.process.exitcode is not None and not self.phases.poll():
                return False
        raise AssertionError(f"never {name}:\n{self.said()}")


class Lab:
    """Starts runs below one folder."""

    def __init__(self, folder: Path, checkpoints: Mapping[str, Path], pairs: Path) -> None:
        self.folder, self.checkpoints, self.pairs = folder, checkpoints, pairs
        self.context = multiprocessing.get_context("forkserver")
        self._count = 0

    def config(
        self, name: str, family: str = "FluxKontext", *, own_cache: bool = False, **sections: Mapping[str, Any]
    ) -> Path:
        """A configuration file in a folder of its own, with its output beside it; sections are merged in.

        Args:
            own_cache: encode into `cache` beside the file. Else all runs of the laboratory share one, since half of so
                short a run goes into encoding.
        """
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        base: dict[str, Any] = {
            "model": {
                "pretrained_model_name_or_path": str(self.checkpoints[family]),
                "lora": {"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"},
            },
            "data": {"init_args": {"dataset_path": str(self.pairs), "resolution": 32, "caption_dropout_rate": 0.3}},
            "train": {"max_train_steps": 12, "mixed_precision": "no", "checkpointing_steps": 2},
            "optimizer": {"init_args": {"lr": 1e-2}},
            "lr_scheduler": {"scheduler_type": "cosine", "warmup_steps": 2},
            "cache": {"use_cache": True, "cache_dir": str((place if own_cache else self.folder) / "cache")},
            "logging": {"output_dir": str(place / "output"), "report_to": "none", "tracker_project_name": "project"},
        }
        for section, values in sections.items():
            base[section] = merge(base.get(section), values)
        path = place / "config.yaml"
        path.write_text(yaml.safe_dump(base))
        return path

    def start(
        self,
        config: Path,
        *overrides: str,
        verb: str = "train",
        phases: bool = False,
        sabotage: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Trial:
        """Begin a run.

        Args:
            phases: have it report what it does.
            sabotage: "name:argument" of a function in sabotage.py that is called in the process first.
        """
        self._count += 1
        log = config.parent / f"log-{self._count}.txt"
        ours, theirs = self.context.Pipe(duplex=False) if phases else (None, None)
        arguments = [verb, str(config), *overrides]
        process = self.context.Process(
            target=_run, args=(arguments, str(log), dict(environment or {}), theirs, sabotage), daemon=True
        )
        process.start()
        if theirs is not None:
            theirs.close()
        return Trial(process, log, ours)

    def run(self, config: Path, *overrides: str, expect: int = 0, **options: Any) -> Trial:
        """A run to its end, which must have the exit code `expect`."""
        trial = self.start(config, *overrides, **options)
        code = trial.wait()
        assert code == expect, f"exit code {code} instead of {expect}:\n{trial.said()}"
        return trial

    def run_together(self, config: Path, *overrides: str, processes: int = 2, **options: Any) -> list[Trial]:
        """Start one run of several processes that talk over gloo, as torchrun would."""
        self._count += 1
        port = 20_000 + (os.getpid() * 37 + self._count) % 10_000
        shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(port)}  # fmt: skip
        return [
            self.start(
                config, *overrides, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options
            )
            for rank in range(processes)
        ]  # fmt: skip


def merge(base: Any, values: Any) -> Any:
    if isinstance(base, dict) and isinstance(values, dict):
        return {**base, **{key: merge(base.get(key), value) for key, value in values.items()}}
    return values


def _run(
    arguments: Sequence[str], log: str, environment: Mapping[str, str], phases: Connection | None, sabotage: str | None
) -> None:
    """In the forked child: be `qif`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    import sabotages
    import torch

    torch.set_num_threads(1)  # here, before threads of a loader do it all at once: a fork leaves torch without its pool

    if phases is not None:
        sabotages.report_phases(phases)
    if sabotage is not None:
        name, _, argument = sabotage.partition(":")
        getattr(sabotages, name)(argument)
    from qwen_image_finetune.command import cli

    sys.exit(cli.main(arguments))


# What is left of them


def versions(config: Path) -> list[Path]:
    """Version folders of a configuration's project, oldest first."""
    found = (config.parent / "output" / "project").glob("v*")
    return sorted(found, key=lambda path: int(path.name[1:]))


def checkpoints(version: Path) -> dict[int, Path]:
    """Visible checkpoint folders by step, oldest first."""
    found = {int(path.name.rsplit("-", 1)[1]): path for path in version.glob("checkpoint-*-*")}
    return dict(sorted(found.items()))


def state_of(checkpoint: Path) -> dict[str, bytes]:
    """Everything that decides how training goes on, byte for byte."""
    found = {name: (checkpoint / name).read_bytes() for name in STATE_FILES if (checkpoint / name).exists()}
    for path in sorted(checkpoint.glob("transformer/*.safetensors")):
        found[path.name] = path.read_bytes()
    assert len(found) > 3
    return found


def curve(version: Path) -> list[dict[str, Any]]:
    """The logged values of every step and of every round of validation, without the time and the memory it took."""
    lines = [json.loads(line) for line in (version / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def outcome(version: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Final state, samples and the best checkpoint, byte for byte, and whole curve."""
    found = state_of(list(checkpoints(version).values())[-1])
    samples = [path for path in sorted((version / "samples").rglob("*")) if path.is_file()]
    found |= {str(path.relative_to(version)): path.read_bytes() for path in samples}
    if (version / "best.json").exists():
        found["best.json"] = (version / "best.json").read_bytes()
        found["best checkpoint"] = b"".join(state_of(version / json.loads(found["best.json"])["checkpoint"]).values())
    return found, curve(version)


def difference(expected: tuple[dict[str, bytes], Any], found: tuple[dict[str, bytes], Any]) -> str | None:
    """What differs between two outcomes."""
    for name in expected[0].keys() | found[0].keys():
        if expected[0].get(name) != found[0].get(name):
            return f"{name} differs"
    return None if expected[1] == found[1] else f"the curves differ: {expected[1]} and {found[1]}"


def half_written(folder: Path) -> list[str]:
    """Hidden leftovers of unfinished writes anywhere below a folder."""
    from qwen_image_finetune.disk.files import LEFTOVER

    return [str(path) for path in folder.rglob(".*") if LEFTOVER.match(path.name)]
