"""NaN and Inf in latents, losses and gradients: not learnt from, named, and after three in a row the run stops."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from lab import FAMILIES, FULL, Lab, checkpoints, curve, record, state_of, versions, write_pairs
from safetensors.torch import load_file

from qwen_image_finetune.encoding.store import Store

PLACES = list(itertools.product(("loss", "gradient"), ("nan", "inf"), ("no", "bf16"), (1, 4)))


def finite(version: Path) -> bool:
    """Whether every number in every checkpoint is finite."""
    files = [path for folder in checkpoints(version).values() for path in folder.rglob("*.safetensors")]
    assert files
    return all(torch.isfinite(tensor.float()).all() for path in files for tensor in load_file(path).values())


@pytest.mark.timeout(1800)
def test_losses_and_gradients_that_are_not_finite(lab: Lab) -> None:
    lost, tried = [], 0
    for number, (where, value, precision, accumulation) in enumerate(PLACES if FULL else PLACES[::5]):
        settings = {"max_train_steps": 9, "checkpointing_steps": 1, "mixed_precision": precision,
                    "gradient_accumulation_steps": accumulation}  # fmt: skip
        # One bad micro-batch in step 3: skipped. All from step 5 on: stopped after step 7.
        for first, last in ((accumulation * 2 + 1, accumulation * 2 + 1), (accumulation * 4 + 1, 10**6)):
            tried += 1
            config = lab.config(f"bad-{number}-{first}", FAMILIES[number % 2], train=settings)
            stops = last > first
            trial = lab.run(config, sabotage=f"not_finite:{where},{value},{first},{last}", expect=2 if stops else 0)
            said, (version,) = trial.said(), versions(config)
            saved, problem = checkpoints(version), []
            if not finite(version):
                problem.append("a checkpoint holds what is not finite")
            bad = [5, 6, 7] if stops else [3]
            if said.count("not learnt from") != len(bad) or any(f"step {step}: " not in said for step in bad):
                problem.append("the steps are not named")
            if "its samples were" not in said:
                problem.append("the samples are not named")
            if max(saved) != (7 if stops else 9) or len(curve(version)) != max(saved):
                problem.append(f"saved {list(saved)}")
            before, after = (state_of(saved[step])["adapter.safetensors"] for step in (bad[0] - 1, bad[-1]))
            if before != after:
                problem.append("a bad step changed the weights")
            if problem:
                lost.append((where, value, precision, accumulation, problem, said))
    record("NaN, Inf in losses and gradients", tried, lost)


@pytest.mark.timeout(900)
def test_latents_that_are_not_finite(lab: Lab, tmp_path: Path) -> None:
    """One poisoned latent of seven in the cache, with a right checksum; then one of everything."""
    pairs = write_pairs(tmp_path / "pairs", 7)
    lost, tried = [], 0
    values = (float("nan"), float("inf"))
    for family, value in itertools.product(FAMILIES, values) if FULL else zip(FAMILIES, values, strict=True):
        config = lab.config(
            f"latent-{family}-{value}", family, own_cache=True, data={"init_args": {"dataset_path": str(pairs)}},
            train={"max_train_steps": 14, "checkpointing_steps": 1},
        )  # fmt: skip
        lab.run(config, verb="cache")
        store = Store(config.parent / "cache")
        keys = [path.stem for path in sorted(store.folder.glob("??/*.safetensors"))]
        latents = [key for key in keys if "latent" in store.read(key)]
        for poisoned in (latents[:1], latents):
            tried += 1
            for key in poisoned:
                latent = store.read(key)["latent"].clone()
                latent.view(-1)[7] = value
                store.write(key, {"latent": latent})
            name = f"logging.tracker_project_name=p{len(poisoned)}"
            all_bad = len(poisoned) > 1
            said = lab.run(config, name, expect=2 if all_bad else 0).said()
            version = config.parent / "output" / f"p{len(poisoned)}" / "v0"
            # A picture is seen once an epoch, so a single bad one never makes three bad steps in a row.
            if not finite(version) or said.count("not learnt from") != (3 if all_bad else 2):
                lost.append((family, value, len(poisoned), said))
    record("NaN, Inf in latents", tried, lost)
