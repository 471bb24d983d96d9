"""A round of validation that is cut short is made up for: the run ends as one that was never interrupted."""

from __future__ import annotations

import itertools
import shutil
import signal
from pathlib import Path

import pytest
from lab import FULL, KILLED, Lab, curve, difference, half_written, outcome, record, versions, write_pairs

# After steps 2, 3, 4, 6, 8 (a round at every checkpoint, samples at every third step), and the last one, 9.
SETTINGS = {"checkpointing_steps": 2, "checkpoints_total_limit": 1, "max_train_steps": 9}
ROUNDS = {"enabled": True, "share": 0.3, "steps": 3, "num_validation_samples": 1, "num_inference_steps": 1}
STEPS = (2, 3, 4, 6, 8, 9)
PLACES = ("round", "loss", "best", "samples", "line")  # where in a round the process dies; after the last it is whole


@pytest.mark.timeout(1800)
def test_killed_in_any_round(lab: Lab, tmp_path: Path) -> None:
    rest = {"data": {"init_args": {"dataset_path": str(write_pairs(tmp_path / "pairs", 6))}}, "validation": ROUNDS}
    # So fast that the last step is not the best one: a limit of 1 alone would remove the best.
    rest |= {"optimizer": {"init_args": {"lr": 0.5}}, "lr_scheduler": {"scheduler_type": "constant", "warmup_steps": 0}}
    whole = lab.config("whole-rounds", train=SETTINGS, **rest)
    lab.run(whole)
    expected = outcome(versions(whole)[0])
    assert [line["step"] for line in expected[1] if "loss" not in line] == list(STEPS)
    assert b'"step": 9' not in expected[0]["best.json"]

    every = list(itertools.product(range(1, len(STEPS) + 1), PLACES))
    chosen = every if FULL else [(1, "best"), (2, "samples"), (3, "round"), (4, "line"), (6, "loss")]
    lost: list[object] = []
    for number, place in chosen:
        config = lab.config(f"round-{number}-{place}", train={**SETTINGS, "resume_from_checkpoint": "latest"}, **rest)
        lab.run(config, sabotage=f"die_in_a_round:{number},{place}", expect=KILLED)
        said = lab.run(config).said()
        (version,) = versions(config)
        different = difference(expected, outcome(version)) or half_written(config.parent)
        # At step 3 only samples are drawn, and a kill takes the step as well; early in a round its checkpoint is maybe
        # still being written.
        owed = STEPS[number - 1] != 3 and place in ("best", "samples")
        if different or (owed and "is made up for" not in said) or (place == "line" and "is made up for" in said):
            lost.append((number, place, different, said))
        shutil.rmtree(config.parent)
    record("SIGKILL in a round of validation", len(chosen), lost)


@pytest.mark.timeout(900)
def test_told_to_stop_in_the_last_round(lab: Lab, tmp_path: Path) -> None:
    """Nothing is left to train then; the round is made up for all the same, once."""
    settings = {"checkpointing_steps": 100, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    rounds = {**ROUNDS, "steps": 100, "num_loss_sigmas": 4}
    data = {"init_args": {"dataset_path": str(write_pairs(tmp_path / "pairs", 6))}}
    whole = lab.config("whole-last", train=settings, data=data, validation=rounds)
    lab.run(whole)
    config = lab.config("told-in-the-last", train=settings, data=data, validation=rounds)
    trial = lab.start(config, phases=True, sabotage="slow_steps:0.3")
    trial.await_phase("drawing")
    trial.kill(signal.SIGTERM)
    assert trial.wait() == 143, trial.said()
    (version,) = versions(config)
    assert [line["step"] for line in curve(version)] == [1, 2, 3]
    assert "is made up for" in lab.run(config).said()
    assert not difference(outcome(versions(whole)[0]), outcome(version))
    assert "nothing is left to train" in lab.run(config).said()


@pytest.mark.parametrize("level", ["output", "project", "version", "checkpoint"])
@pytest.mark.timeout(900)
def test_a_run_goes_on_where_it_was_moved_to(lab: Lab, level: str) -> None:
    """Its output folder, its project, its version or its newest checkpoint is a link to another disk by now."""
    settings = {"checkpointing_steps": 2, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    config = lab.config(f"moved-{level}", train=settings)
    lab.run(config)
    output = config.parent / "output"
    (newest,) = (output / "project" / "v0").glob("checkpoint-*-4")
    place = {"output": output, "project": output / "project", "version": newest.parent, "checkpoint": newest}[level]
    place.rename(config.parent / "elsewhere")
    place.symlink_to(config.parent / "elsewhere")
    lab.run(config, "train.max_train_steps=6")
    (version,) = versions(config)
    assert version.name == "v0" and [line["step"] for line in curve(version)] == [1, 2, 3, 4, 5, 6]
    assert newest.is_dir() and (version / "log.txt").read_text().count("attention: ") == 2
