"""Folders that cannot be written, and one cache for several runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import FAMILIES, Lab, difference, full_or, half_written, outcome, record, versions

# `qif` in an interpreter in which importing torch fails: what is refused is refused before that. One has been started
# for all command lines, which are read from a file, and each has a process that it forks: what that says goes to a file
# of its number, and (exit code, CPU seconds) of each, what was imported for all of them included, are printed.
WITHOUT_TORCH = """
import json, os, resource, sys
from pathlib import Path
sys.modules["torch"] = sys.modules["diffusers"] = sys.modules["transformers"] = None
from qwen_image_finetune.command import cli
folder, ended = Path(sys.argv[1]), []
commands = json.loads((folder / "commands.json").read_text())
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
cli.main(commands[0])  # imports what they all need
sys.stdout.flush()
os.dup2(said, 1)
usage = resource.getrusage(resource.RUSAGE_SELF)
imports = usage.ru_utime + usage.ru_stime
for number, words in enumerate(commands):
    if (child := os.fork()) == 0:
        said = os.open(folder / f"said-{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        try:
            code = cli.main(words)
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    ended.append((os.waitstatus_to_exitcode(status), imports + usage.ru_utime + usage.ru_stime))
print(json.dumps(ended))
"""


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path | None]:
    """A file system mounted read-only, where that is allowed."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, check=False
    )
    yield None if mounted.returncode else folder
    if not mounted.returncode:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.timeout(900)
def test_folders_that_cannot_be_written_are_refused_at_once(lab: Lab, read_only: Path | None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "deep")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "loop", Path("/proc"), Path("/proc/1/x"),
              tmp_path / ("x" * 300)]  # fmt: skip
    if read_only is not None:
        places += [read_only, read_only / "below"]
    keys = (("logging.output_dir", "train"), ("cache.cache_dir", "train"), ("cache.cache_dir", "cache"))
    cases = [(place, key, verb) for place in places for key, verb in keys]
    commands = [
        [verb, str(lab.config(f"refused-{number}")), f"{key}={place}"]
        for number, (place, key, verb) in enumerate(cases)
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], capture_output=True, text=True,
                          timeout=600, check=True, env={**os.environ, "PYTHONPATH": str(root)})  # fmt: skip
    ended = json.loads(done.stdout)
    lost: list[object] = []
    for number, ((place, key, _), (code, _)) in enumerate(zip(cases, ended, strict=True)):
        said = (tmp_path / f"said-{number}.txt").read_text()
        if code != 2 or f"error: {key}=" not in said or "Traceback" in said:
            lost.append((key, place, code, said))
    slowest = max(seconds for _, seconds in ended)
    if slowest > 5:
        lost.append(f"{slowest} s")
    record(
        "folders that cannot be written",
        len(cases),
        lost,
        f"refused before torch is imported, {slowest:.1f} s of CPU at most",
    )


@pytest.mark.timeout(900)
def test_missing_folders_are_made(lab: Lab) -> None:
    config = lab.config("made", train={"max_train_steps": 1})
    place = config.parent / "a" / "b"
    lab.run(config, f"logging.output_dir={place / 'output'}", f"cache.cache_dir={place / 'cache'}")
    assert (place / "output" / "project" / "v0" / "checkpoint-0-1").is_dir()


@pytest.mark.timeout(1800)
def test_one_cache_for_several_runs_at_once(lab: Lab) -> None:
    """Runs of both families fill one cache together while some of them are killed; none is disturbed."""
    chance, tried, lost = random.Random(0), full_or(20, 1), []
    expected = {}
    for family in FAMILIES:
        config = lab.config(f"lonely-{family}", family)
        lab.run(config)
        expected[family] = outcome(versions(config)[0])
    for number in range(tried):
        cache = {"cache_dir": str(lab.folder / f"shared-{number}")}
        configs = [lab.config(f"share-{number}-{place}", FAMILIES[place % 2], cache=cache) for place in range(4)]
        doomed = [lab.config(f"doomed-{number}-{place}", FAMILIES[place % 2], cache=cache) for place in range(2)]
        killed = [lab.start(config, phases=True) for config in doomed]
        trials = [lab.start(config) for config in configs]
        for trial in killed:
            trial.await_phase("caching", chance.randint(1, 8))
            time.sleep(chance.uniform(0, 0.01))
            trial.kill()
        codes = [trial.wait() for trial in trials]
        problems = [trial.said() for trial, code in zip(trials, codes, strict=True) if code]
        for place, config in enumerate(configs):
            if not problems:
                problems += filter(None, [difference(expected[FAMILIES[place % 2]], outcome(versions(config)[0]))])
        said = lab.run(configs[0], verb="cache").said()
        if "is complete" not in said or half_written(Path(cache["cache_dir"])):
            problems.append(said)
        if problems:
            lost.append((number, problems))
    record("a cache shared by runs at once", tried, lost, "six runs each, two of them killed while they fill it")
