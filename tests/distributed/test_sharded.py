"""A model shared by FSDP2 learns what the whole model learns, and its checkpoints are the same checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import accelerated, two_machines
from outcomes import checkpoint, furthest, losses, metrics, weights
from PIL import Image

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
           "validation.num_inference_steps=2")  # fmt: skip
ADAM = ("optimizer.class_path=torch.optim.AdamW", "optimizer.init_args={lr: 0.001}")


def files(folder: Path) -> dict[str, tuple[object, bytes]]:
    """(header, tensors) of the files for users in a checkpoint. The order of a header's entries is left to chance."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        if path.name == "pytorch_lora_weights.safetensors" or path.parent.name == "transformer":
            data = path.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            header["__metadata__"].pop("modelspec.date", None)
            found[str(path.relative_to(folder))] = (header, data[end:])
    assert found
    for path in folder.glob("transformer/config.json"):
        found["config"] = (json.loads(path.read_text()), b"")
    return found


def test_shared_equals_whole(task: Callable[..., Any], run_all: Callable[..., Any], alone: Callable[..., Path]) -> None:
    kinds = [(name, more) for name in FAMILY_NAMES for more in (SAMPLES, (FULL,))]
    tasks = [task(name, f"{name}-{len(more)}", *OPTIONS, *more) for name, more in kinds]
    references = [alone(job, TWICE) for job in tasks]
    whole = task(FAMILY_NAMES[0], "adam", *OPTIONS, *ADAM, FULL)
    again = task(
        FAMILY_NAMES[0],
        "again",
        *OPTIONS,
        *ADAM,
        FULL,
        resume=[str(Path(references[0]).parents[2] / "output/adam/v0"), 2],
    )
    onwards = [task(name, f"onwards-{len(more)}", *OPTIONS, *more, resume=[str(references[place]), 2])
               for place, (name, more) in enumerate(kinds) if place in (0, 3)]  # fmt: skip
    results = run_all([accelerated("fsdp2.yaml", 2)], [*tasks, whole, again, *onwards])

    for (_, more), result, other, reference in zip(kinds, *results, references, strict=False):
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
        if more == SAMPLES:
            drawn = [sorted((Path(each) / "samples/step-3").glob("*.png")) for each in (run, reference)]
            assert [path.name for path in drawn[0]] == ["0.png", "1.png", "2.png"]
            for pair in zip(*drawn, strict=True):
                ours, theirs = (np.asarray(Image.open(path), dtype=np.int16) for path in pair)
                assert abs(ours - theirs).max() <= 1

    # A resume of a shared run is exact; a shared run continues one process's, and one process a shared one's.
    adam, resumed = (result["run"] for result in results[0][len(tasks) : len(tasks) + 2])
    assert losses(resumed) == losses(adam)[2:]
    assert all(torch.equal(weights(adam)[name], tensor) for name, tensor in weights(resumed).items())
    for result, reference in zip(results[0][len(tasks) + 2 :], (references[0], references[3]), strict=True):
        assert furthest(weights(result["run"]), weights(reference), weights(reference, 1)) < BOUND
    for place in (1, 2):
        name, more = kinds[place]
        back = alone(task(name, f"back-{place}", *OPTIONS, *more, TWICE, resume=[results[0][place]["run"], 2]))
        assert furthest(weights(back), weights(references[place]), weights(references[place], 1)) < BOUND


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
