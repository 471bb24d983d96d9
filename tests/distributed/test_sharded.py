"""A model shared by FSDP2 learns what the whole model learns, and its checkpoints are the same checkpoints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import accelerated, two_machines
from outcomes import checkpoint, files, furthest, losses, metrics, weights
from PIL import Image
from safetensors.torch import load_file, save_file

FAMILY_NAMES = ["FluxKontext", "QwenImageEdit"]
BOUND = 1e-4  # of the largest movement of a weight: float32 sums of two gradients in another order
OPTIONS = (
    "train.max_train_steps=4", "train.checkpointing_steps=1", "optimizer.init_args={lr: 0.1, momentum: 0.9}",
    "optimizer.class_path=torch.optim.SGD", "lr_scheduler.scheduler_type=constant_with_warmup",
    "lr_scheduler.warmup_steps=1",
)  # fmt: skip
FULL = "model.lora=null"
TWICE = "train.gradient_accumulation_steps=2"
SAMPLES = ("validation.enabled=true", "validation.steps=3", "validation.num_validation_samples=3",
           "validation.num_inference_steps=2", "train.ema={enabled: true, decay: 0.5}")  # fmt: skip


def test_shared_equals_whole(task: Callable[..., Any], run_all: Callable[..., Any], alone: Callable[..., Path]) -> None:
    other = (*SAMPLES, "model.lora.init_lora_weights=true", "model.lora.type=lokr", "model.lora.max_norm=0.5")
    kinds = [(name, more) for name, adapted in zip(FAMILY_NAMES, (SAMPLES, other), strict=True)
             for more in (adapted, (FULL,))]  # fmt: skip
    tasks = [task(name, f"{name}-{len(more)}", *OPTIONS, *more) for name, more in kinds]
    references = [alone(job, TWICE) for job in tasks]
    results = run_all([accelerated("fsdp2.yaml", 2)], tasks)

    for (_, more), result, other, reference in zip(kinds, *results, references, strict=True):
        run = result["run"]
        assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
        norms = [[line["grad_norm"] for line in metrics(each)] for each in (run, reference)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        assert furthest(weights(run), weights(reference), weights(reference, 1)) < BOUND
        # The learning rate of the first step is 0: the same weights must become the same bytes.
        assert files(checkpoint(run, 1)) == files(checkpoint(reference, 1))
        base = sum(
            tensor.numel() for tensor in weights(results[0][1 if run == results[0][0]["run"] else 3]["run"]).values()
        )
        assert abs(result["bytes"] - other["bytes"]) < 0.1 * result["bytes"]
        assert result["bytes"] < 1.1 * (4 * base / 2)
        if more != (FULL,):
            drawn = [sorted((Path(each) / "samples/step-3").glob("*.png")) for each in (run, reference)]
            assert [path.name for path in drawn[0]] == ["0.png", "1.png", "2.png"]
            for pair in zip(*drawn, strict=True):
                ours, theirs = (np.asarray(Image.open(path), dtype=np.int16) for path in pair)
                assert abs(ours - theirs).max() <= 1


def test_in_less_memory_and_what_is_refused(
    task: Callable[..., Any], run_all: Callable[..., Any], alone: Callable[..., Path], flux_folder: Path, tmp_path: Path
) -> None:
    """bfloat16 with recomputation learns what it learns unshared; a base in e4m3 is not read without its scales."""
    name, quantised = FAMILY_NAMES[0], tmp_path / "quantised"
    shutil.copytree(flux_folder, quantised)
    file = quantised / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}, file)
    lean = ("train.mixed_precision=bf16", "train.gradient_checkpointing=true")
    tasks = [task(name, "lean", *OPTIONS, *lean), task(name, "lean-full", *OPTIONS, FULL, *lean)]
    references = [alone(job, TWICE) for job in tasks]
    refused = task(name, "fp8", f"model.pretrained_model_name_or_path={quantised}", do="refused")
    for process in run_all([accelerated("fsdp2.yaml", 2)], [*tasks, refused]):
        assert re.search(r"transformer are fp8 .*, with FSDP: .*ddp\.yaml", process[-1]["refused"])
        if process[0]["run"] is not None:
            for result, reference in zip(process, references, strict=False):
                assert losses(result["run"]) == pytest.approx(losses(reference), rel=1e-2)  # 8 bits of mantissa


def test_another_number_of_processes(
    task: Callable[..., Any], run_all: Callable[..., Any], alone: Callable[..., Path]
) -> None:
    """From two to four processes, and the part that each holds is a quarter."""
    first = task("QwenImageEdit", "two", *OPTIONS, FULL, TWICE)
    reference = alone(first, "train.gradient_accumulation_steps=4")
    held = run_all([accelerated("fsdp2.yaml", 2)], [first])[0][0]
    onwards = task("QwenImageEdit", "four", *OPTIONS, FULL, resume=[held["run"], 2])
    quarter = run_all(two_machines(2), [{**onwards, "shared": True}])
    assert losses(quarter[0][0]["run"]) == pytest.approx(losses(reference)[2:], rel=1e-5)
    assert furthest(weights(quarter[0][0]["run"]), weights(reference), weights(reference, 1)) < BOUND
    for result in quarter:
        assert result[0]["bytes"] == pytest.approx(held["bytes"] / 2, rel=0.1)


def test_every_kind_of_adapter_is_cut(torchrun: Callable[..., Any], tmp_path: Path) -> None:
    """Answers, gradients, steps and limited norms are those of whole adapters; both processes have the same batch."""
    done = torchrun(2, "tests/distributed/cut_adapters.py", str(tmp_path / "found"))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = dict(line.split() for line in (tmp_path / f"found.{rank}").read_text().splitlines())
        assert found.keys() == {"lora", "lokr", "loha", "oft"}
        assert all(float(distance) < 1e-5 for distance in found.values()), found
