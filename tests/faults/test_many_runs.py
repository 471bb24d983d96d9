"""Runs that start at the same moment in one output folder."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from lab import FAMILIES, Lab, checkpoints, curve, difference, full_or, outcome, record, versions

from qwen_image_finetune.disk import runs
from qwen_image_finetune.disk.manifest import verify_folder


def _claim(project: str, together: Barrier, number: int) -> None:
    """In a child: claim a version at one moment with all others, write into it, see that it stays as it is."""
    together.wait(300)
    run = runs.claim_version(Path(project))
    (run.path / "mine").write_text(str(number))
    run.record(1, {"loss": 1.0})
    together.wait(300)  # all have claimed by now, and none has ended
    mine = {path.name for path in run.path.iterdir()} == {"mine", "metrics.jsonl", "run.json", "run.lock"}
    if not mine or (run.path / "mine").read_text() != str(number):
        raise SystemExit(3)
    together.wait(300)
    run.finish("finished", 1)
    run.close()


def ended(project: Path, steps: int, state: runs.State, saved: bool) -> Path:
    run = runs.claim_version(project)
    for step in range(1, steps + 1):
        run.record(step, {"loss": 0.0})
    if saved:
        from qwen_image_finetune.disk.files import staged_folder

        with staged_folder(run.checkpoint_path(0, steps)) as folder:
            (folder / "x").write_text("x")
    run.finish(state, steps)
    run.close()
    return run.path


@pytest.mark.timeout(3600)
def test_many_claims_at_once(lab: Lab, tmp_path: Path) -> None:
    processes, rounds, lost = full_or(64, 16), full_or(20, 2), []
    context = multiprocessing.get_context("forkserver")
    for number in range(rounds):
        project = tmp_path / f"project-{number}"
        kept = [ended(project, 9, "finished", False), ended(project, 3, "interrupted", True)]
        short = ended(project, 2, "finished", True)
        together = context.Barrier(processes)
        started: list[ForkServerProcess] = [
            context.Process(target=_claim, args=(str(project), together, place), daemon=True)
            for place in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(400)
        codes = [process.exitcode for process in started]
        names = {path.name for path in project.glob("v*")}
        # All are short and ended now; the next claim would remove them, but none may have removed another.
        whole = len((kept[0] / "metrics.jsonl").read_text().splitlines()) == 9
        sound = verify_folder(kept[1] / "checkpoint-0-3") is None
        number_taken = short.name in names and (short / "mine").exists()  # the short one went, its number was free
        if any(codes) or len(names) != 2 + processes or not (whole and sound and number_taken):
            lost.append((number, codes, len(names), whole, sound, number_taken))
    record(
        f"{processes} runs claim a version at once", rounds, lost, "each its own version, no file of another touched"
    )


@pytest.mark.timeout(3600)
def test_whole_runs_at_once(lab: Lab) -> None:
    """The same with whole trainings, which also share their cache, while longer ones go on."""
    tried, together, lost = full_or(3, 1), full_or(16, 4), []
    expected = {}
    for family in FAMILIES:
        config = lab.config(f"single-{family}", family, train={"max_train_steps": 4})
        lab.run(config)
        expected[family] = outcome(versions(config)[0])
    for number in range(tried):
        config = lab.config(f"crowd-{number}", own_cache=True, train={"max_train_steps": 4})
        other = lab.checkpoints["QwenImageEdit"]
        trials = [
            lab.start(config, *([f"model.pretrained_model_name_or_path={other}"] if place % 2 else []))
            for place in range(together)
        ]
        codes = [trial.wait(600) for trial in trials]
        mine = [Path(trial.said().rpartition("done: ")[2].strip()) for trial in trials]
        problems = [trial.said() for trial, code in zip(trials, codes, strict=True) if code]
        if len(set(mine)) != together:
            problems.append(f"versions {mine}")
        # Four steps are a short run: another start may remove it once it has ended, but never change it.
        for place, version in enumerate(mine):
            if not problems and version.exists():
                problems += filter(None, [difference(expected[FAMILIES[place % 2]], outcome(version))])
                problems += filter(None, [verify_folder(folder) for folder in checkpoints(version).values()])
                assert len(curve(version)) == 4
        if problems:
            lost.append((number, problems))
    record(f"{together} whole runs at once", tried, lost)
