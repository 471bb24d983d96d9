"""SIGKILL at any moment, half of the time inside saving or caching."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
from lab import (
    FAMILIES,
    KILLED,
    Lab,
    checkpoints,
    difference,
    full_or,
    half_written,
    outcome,
    record,
    versions,
    write_pairs,
)

from qwen_image_finetune.disk.manifest import verify_folder

LIMIT, EVERY = 1, 2
SETTINGS = {"checkpointing_steps": EVERY, "checkpoints_total_limit": LIMIT}
# A round of validation after every checkpoint, and samples at other steps as well; the rate is so high that the best
# checkpoint is not the last.
ROUNDS = {"enabled": True, "share": 0.3, "steps": 3, "num_validation_samples": 1, "num_inference_steps": 1}


AIMS = {"caching": 10, "saving": 4, "drawing": 6, "removing": 3}  # and how often each comes, or nearly
# In turn: half of the kills are aimed, and each aim is met in the first five.
TURNS = ("caching", "saving", "drawing", "removing", "anywhere", "drawing", *["anywhere"] * 4)


def problem_of_what_is_left(config: Path) -> str | None:
    """Whether a killed run broke a promise: every visible checkpoint is whole, and as many as promised are there."""
    for version in versions(config):
        found = checkpoints(version)
        for folder in found.values():
            if (damage := verify_folder(folder)) is not None:
                return damage
        promised = min(LIMIT, max(found, default=0) // EVERY)
        if len(found) < promised:
            return f"{len(found)} checkpoints where {promised} are promised"
    return None


@pytest.mark.timeout(3600)
def test_killed_at_any_moment(lab: Lab, tmp_path: Path) -> None:
    """The restarted run ends exactly as the one that was never interrupted."""
    chance = random.Random(0)
    pairs = write_pairs(tmp_path / "pairs", 6)
    rest = {"validation": ROUNDS, "data": {"init_args": {"dataset_path": str(pairs)}}}
    expected, seconds = {}, {}
    for family in FAMILIES:
        config = lab.config(f"whole-{family}", family, own_cache=True, train=SETTINGS, **rest)
        began = time.monotonic()
        lab.run(config)
        seconds[family] = time.monotonic() - began
        (version,) = versions(config)
        expected[family] = outcome(version)

    tried, lost, moments = full_or(200, 5), [], dict.fromkeys(["anywhere", *AIMS, "ended"], 0)
    for number in range(tried):
        family = FAMILIES[(number + number // len(TURNS)) % 2]
        settings = {**SETTINGS, "resume_from_checkpoint": "latest"}
        config = lab.config(f"killed-{number}", family, own_cache=True, train=settings, **rest)
        for again in range(2 if number % 3 == 0 else 1):  # every third trial is killed twice
            aim = TURNS[number % len(TURNS)]
            aim = "saving" if again and aim == "caching" else aim  # the cache is complete by then
            trial = lab.start(config, phases=True)
            if aim == "anywhere":
                time.sleep(chance.uniform(0, seconds[family]))
            else:
                trial.await_phase(aim, chance.randint(1, AIMS[aim]))
                time.sleep(chance.uniform(0, 0.03))
            trial.kill()
            moments[aim if trial.process.exitcode == KILLED else "ended"] += 1
            if (damage := problem_of_what_is_left(config)) is not None:
                lost.append((number, aim, damage))
        lab.run(config)
        different = difference(expected[family], outcome(versions(config)[-1]))
        if different or half_written(config.parent):
            lost.append((number, different, half_written(config.parent)))
        else:
            shutil.rmtree(config.parent)
    note = ", ".join(f"{count} {moment}" for moment, count in moments.items())
    record("SIGKILL at any moment", tried, lost, f"kills: {note}")
