"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP at any moment, also while loading, caching, saving or drawing."""

from __future__ import annotations

import random
import shutil
import signal
import time

import pytest
from lab import FAMILIES, Lab, checkpoints, curve, difference, full_or, half_written, outcome, record, versions

from qwen_image_finetune.disk.manifest import verify_folder

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143, signal.SIGHUP: 143}
DRAWING = {"enabled": True, "share": 0.3, "steps": 3, "num_validation_samples": 2, "num_inference_steps": 3}
PHASES = {"begun": 1, "filling": 1, "caching": 10, "loading": 1, "step": 10, "saving": 3, "drawing": 3}


@pytest.mark.timeout(3600)
def test_a_signal_at_any_moment(lab: Lab) -> None:
    chance = random.Random(0)
    expected = {}
    for family in FAMILIES:
        config = lab.config(f"told-{family}", family, validation=DRAWING)
        lab.run(config)
        expected[family] = outcome(versions(config)[-1])

    tried, lost = full_or(100, len(PHASES)), []
    seen: dict[str, int] = {}
    for number in range(tried):
        family, kind = FAMILIES[number % 2], list(CODES)[number % len(CODES)]
        aim = list(PHASES)[number % len(PHASES)]
        config = lab.config(
            f"stopped-{number}", family, own_cache=aim in ("filling", "caching"), validation=DRAWING,
            train={"resume_from_checkpoint": "latest"},
        )  # fmt: skip
        trial = lab.start(config, phases=True)
        trial.await_phase(aim, chance.randint(1, PHASES[aim]))
        time.sleep(chance.uniform(0, 0.05))
        trial.kill(kind)
        code = trial.wait()
        finished = code == 0 and "done: " in trial.said()
        moment = "too late" if finished else aim
        seen[moment] = seen.get(moment, 0) + 1
        problem = None if finished or code == CODES[kind] else f"exit code {code}"
        for version in versions(config):
            steps = curve(version)[-1]["step"] if (version / "metrics.jsonl").exists() else 0
            saved = checkpoints(version)
            if steps and (steps not in saved or verify_folder(saved[steps]) is not None):
                problem = f"step {steps} is lost, saved are {list(saved)}"
        if half_written(config.parent):
            problem = f"half-written: {half_written(config.parent)}"
        lab.run(config)
        problem = problem or difference(expected[family], outcome(versions(config)[-1]))
        if problem:
            lost.append((number, family, aim, kind.name, problem, trial.said()))
        else:
            shutil.rmtree(config.parent)
    assert seen.keys() != {"too late"}, "nobody was told anything while it ran"
    record(
        "SIGTERM, SIGINT, SIGUSR1, SIGHUP",
        tried,
        lost,
        ", ".join(f"{count} {moment}" for moment, count in seen.items()),
    )


@pytest.mark.timeout(900)
def test_a_second_interrupt_stops_at_once_while_a_checkpoint_is_written(lab: Lab) -> None:
    config = lab.config("twice", train={"resume_from_checkpoint": "latest", "checkpointing_steps": 100})
    lab.run(lab.config("not-twice", train={"checkpointing_steps": 100}))
    expected = outcome(versions(lab.folder / "not-twice" / "config.yaml")[0])
    lost, tried = [], full_or(10, 1)
    for number in range(tried):
        trial = lab.start(config, phases=True, sabotage="slow_save:100")
        trial.await_phase("step", 2 + number % 5)
        trial.kill(signal.SIGINT)
        trial.await_phase("saving")
        time.sleep(0.1)
        trial.kill(signal.SIGINT)
        if trial.wait(60) != 130 or any(checkpoints(version) for version in versions(config)):
            lost.append(trial.said())
    lab.run(config)
    different = difference(expected, outcome(versions(config)[-1]))
    record("a second SIGINT, while saving", tried, lost + ([different] if different else []))
    assert not half_written(config.parent)


@pytest.mark.timeout(900)
def test_one_of_two_processes_is_told_to_stop(lab: Lab) -> None:
    lab.run(lab.config("alone-told"))  # the cache of a project is not what is tested here
    lost, tried = [], full_or(6, 1)
    for number in range(tried):
        config = lab.config(f"both-{number}", FAMILIES[number % 2])
        trials = lab.run_together(config, "train.max_train_steps=2000", "train.checkpointing_steps=1000", phases=True)
        trials[0].await_phase("step", 3)
        trials[number % 2].kill(signal.SIGTERM)
        codes = [trial.wait() for trial in trials]
        (version,) = versions(config)
        steps = len(curve(version))
        if codes != [143, 143] or list(checkpoints(version)) != [steps]:
            lost.append((codes, steps, list(checkpoints(version)), [trial.said() for trial in trials]))
    record("SIGTERM to one of two processes", tried, lost)
