"""Versions and checkpoints of a project: claimed by many at once, cleaned, found again, whatever happened."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_image_finetune.disk import files, history, manifest, runs, versions
from qwen_image_finetune.disk.events import event_steps
from qwen_image_finetune.disk.files import DiskFull, staged_folder
from qwen_image_finetune.disk.manifest import verify_folder
from qwen_image_finetune.disk.runs import Run, claim_version, outcome, reopen_version, retention, unfinished
from qwen_image_finetune.disk.versions import RunError, find_checkpoint

# `QIF_FAULTS=full` runs the counts that the documentation quotes; otherwise a sample that fits CI.
FULL = os.environ.get("QIF_FAULTS") == "full"
PATHS = [str(Path(__file__).parents[2])]


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A real process that runs `code` with `arguments` as sys.argv[1:]."""
    prelude = f"import os, sys, time\nfrom pathlib import Path\nsys.path[:0] = {PATHS!r}\n"
    imports = "from qwen_image_finetune.disk import files, history, runs, versions\n"
    script = prelude + imports + textwrap.dedent(code)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE  # whoever reads stdin to its end waits until it is killed, however slow this machine is
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def add_checkpoint(version: Path, step: int, epoch: int = 0, size: int = 1000) -> Path:
    final = version / f"checkpoint-{epoch}-{step}"
    with staged_folder(final) as folder:
        (folder / "state").write_bytes(random.Random(step).randbytes(size))
    return final


def end(project: Path, steps: int = 0, state: runs.State = "finished", checkpoint: int | None = None) -> Path:
    """A version that ended after `steps` steps."""
    run = claim_version(project)
    for step in range(1, steps + 1):
        run.record(step, {"loss": 1.0})
    if checkpoint is not None:
        add_checkpoint(run.path, checkpoint)
    run.finish(state, steps)
    run.close()
    return run.path


def damage(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "state").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "state").write_bytes(data)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return tmp_path / "output" / "project"


@pytest.fixture
def run(project: Path) -> Iterator[Run]:
    claimed = claim_version(project)
    yield claimed
    claimed.close()


# Claiming


def test_versions_count_up(project: Path) -> None:
    claimed = [claim_version(project) for _ in range(12)]
    assert [run.name for run in claimed] == [f"v{number}" for number in range(12)]
    assert all(run.path == project / run.name for run in claimed)
    assert json.loads((claimed[0].path / "run.json").read_text()) == {"state": "running", "step": 0}
    for run in claimed:
        run.close()


def test_gaps_links_and_strangers(project: Path, tmp_path: Path) -> None:
    """The next number is one more than the largest taken, by whatever; only what is surely a run is removed."""
    project.mkdir(parents=True)
    (tmp_path / "elsewhere" / "checkpoint-0-2").mkdir(parents=True)
    (project / "v8").symlink_to(tmp_path / "elsewhere")
    (project / "v2").mkdir()  # empty: its process died before it had its lock
    (project / "v3").mkdir()
    (project / "v3" / "notes.txt").write_text("mine")
    (project / "v007").mkdir()
    (project / "version9").mkdir()
    run = claim_version(project)
    assert run.name == "v9"
    assert names(project) == {"v3", "v8", "v9", "v007", "version9"}
    assert (tmp_path / "elsewhere" / "checkpoint-0-2").is_dir()
    run.close()


@pytest.mark.parametrize(("steps", "state", "checkpoint", "kept"), [
    (0, "failed", None, False),
    (4, "finished", None, False),
    (4, "finished", 4, False),      # ended as planned, and short
    (4, "interrupted", None, False),
    (3, "interrupted", 3, True),    # preempted: there is something to resume
    (3, "running", 3, True),        # killed: the same
    (5, "failed", None, True),
    (5, "finished", 5, True),
    (0, "failed", 7, True),         # a checkpoint says more than the other records
])  # fmt: skip
def test_short_ended_versions_go(
    project: Path, steps: int, state: runs.State, checkpoint: int | None, kept: bool
) -> None:
    path = end(project, steps, state, checkpoint)
    claim_version(project).close()
    assert names(project) == ({"v0", "v1"} if kept else {"v0"})
    assert (path / "metrics.jsonl").exists() == (kept and steps > 0)


def test_a_short_version_that_the_new_run_reads_stays(project: Path, tmp_path: Path) -> None:
    started = [claim_version(project) for _ in range(2)]
    for run in started:
        add_checkpoint(run.path, 4)
        run.finish("finished", 4)
    for run in started:
        run.close()
    link = tmp_path / "link"
    link.symlink_to(project)
    claim_version(project, [link / "v1" / "checkpoint-0-4" / "state"]).close()
    assert names(project) == {"v1", "v2"}


def test_damaged_or_foreign_checkpoints_of_five_steps_keep_a_version(project: Path) -> None:
    damage(add_checkpoint(end(project, 2), 9))
    (project / "v1" / "checkpoint-0-100").mkdir(parents=True)
    (project / "v1" / "checkpoint-0-100" / "pytorch_lora_weights.safetensors").touch()
    (project / "v2" / "checkpoint-0-3").mkdir(parents=True)
    claim_version(project).close()
    assert names(project) == {"v0", "v1", "v2"}
    assert "checkpoint-0-3" not in names(project / "v2"), "v2 was short; its number was free again"
    assert names(project / "v1") == {"checkpoint-0-100"}, "not a file was added"


@pytest.mark.parametrize("last", [4, 300])
def test_steps_are_read_from_event_files(project: Path, last: int) -> None:
    """Versions of other programs have no metrics.jsonl; TensorBoard's own writer is the oracle."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(project / "v0")) as writer:
        for step in range(last + 1):
            writer.add_scalar("loss", 1.0, step)
    (events,) = (project / "v0").glob("events.out.tfevents.*")
    assert max(event_steps(events)) == last
    claim_version(project).close()
    assert names(project) == ({"v0"} if last < 5 else {"v0", "v1"})


def test_a_live_version_stays_whatever_its_age_and_steps(project: Path) -> None:
    holder = spawn(
        "run = runs.claim_version(Path(sys.argv[1])); print(run.name, flush=True); sys.stdin.read()", project
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "v0\n"
        for path in (project / "v0", *(project / "v0").iterdir()):
            os.utime(path, (0, 0))
        second = claim_version(project)
        second.close()
        assert names(project) == {"v0", "v1"}
    finally:
        holder.kill()
        holder.communicate()
    claim_version(project).close()
    assert names(project) == {"v0"}, "its process is gone, and it was short"


def test_a_worker_that_outlives_its_trainer_holds_nothing(project: Path) -> None:
    """A forked child keeps copies of open files; it must not keep the lock as well."""
    trainer = spawn(
        """
        run = runs.claim_version(Path(sys.argv[1]))
        child = os.fork()
        if child == 0:
            print(os.getpid(), flush=True)
            sys.stdin.read()
            os._exit(0)
        sys.stdin.read()
        """,
        project,
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    try:
        with pytest.raises(RunError, match=f"process {trainer.pid} on"):
            reopen_version(project / "v0")
        trainer.kill()
        trainer.wait()
        os.kill(worker, 0)  # it is alive
        reopen_version(project / "v0").close()
    finally:
        os.kill(worker, signal.SIGKILL)
        trainer.communicate()


def test_many_claim_at_once(tmp_path: Path) -> None:
    """Each its own version, and none removes another's, though all are shorter than five steps."""
    processes, rounds = (64, 20) if FULL else (16, 1)
    for number in range(rounds):
        project = tmp_path / str(number)
        old = [end(project, 9), end(project, 2, "interrupted", 2), end(project, 1)]
        start = time.time() + 0.5 + processes * 0.1
        started = [
            spawn(
                """
                project, start = Path(sys.argv[1]), float(sys.argv[2])
                time.sleep(max(0, start - time.time()))
                run = runs.claim_version(project)
                (run.path / "mine").write_text(str(os.getpid()))
                print(run.name, flush=True)
                sys.stdin.read()
                """,
                project, start,
            )
            for _ in range(processes)
        ]  # fmt: skip
        try:
            found = [process.stdout.readline().strip() for process in started if process.stdout]
            assert sorted(int(name[1:]) for name in found) == list(range(2, 2 + processes)), found
            for process, name in zip(started, found, strict=True):
                assert (project / name / "mine").read_text() == str(process.pid)
            assert [path.is_dir() for path in old] == [True, True, True]  # v2 is a claimed one now
            assert (old[0] / "metrics.jsonl").exists()
            assert verify_folder(old[1] / "checkpoint-0-2") is None
        finally:
            for process in started:
                process.kill()
                process.communicate()


def test_claiming_killed_at_any_moment(project: Path) -> None:
    """Processes that claim are killed at random moments; nothing of use is lost and the next claim works."""
    kept = [end(project, 9), end(project, 2, "interrupted", 2)]
    chance = random.Random(0)
    for _ in range(100 if FULL else 10):
        process = spawn(
            """
            print(flush=True)
            while True:
                run = runs.claim_version(Path(sys.argv[1]))
                run.close()
            """,
            project,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.communicate()
        run = claim_version(project)
        run.close()
        assert run.name in ("v2", "v3")
        assert {path.name for path in project.iterdir()} == {"v0", "v1", run.name, ".lock"}
        assert history.steps_of(kept[0]) == 9
        assert verify_folder(kept[1] / "checkpoint-0-2") is None


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot make a version folder in .*logging\.output_dir must name"):
        claim_version(tmp_path / "file" / "project")
    with pytest.raises(RunError, match="cannot make a version folder in /proc/project"):
        claim_version(Path("/proc/project"))


# Reopening


def test_reopen_refuses_a_version_in_use(run: Run) -> None:
    with pytest.raises(RunError, match=rf"v0 is in use by process {os.getpid()} on .*resume_from_checkpoint=null"):
        reopen_version(run.path)
    run.close()
    again = reopen_version(run.path)
    assert again.name == "v0"
    again.close()


def test_reopen_cleans_what_a_killed_process_left(project: Path) -> None:
    path = end(project, 9, "running", 6)
    (path / ".checkpoint-0-9.partial-1-00000000").mkdir()
    (path / ".checkpoint-0-3.trash-1-00000000").mkdir()
    os.rename(path / "checkpoint-0-6", path / ".checkpoint-0-6.replaced-1-00000000")
    run = reopen_version(path)
    assert {item.name for item in path.iterdir()} == {"checkpoint-0-6", "metrics.jsonl", "run.json", "run.lock"}
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-0-6"]
    assert json.loads((path / "run.json").read_text()) == {"state": "running", "step": 9}
    run.close()


def test_reopen_of_nothing(project: Path) -> None:
    with pytest.raises(RunError, match="v3 is not there"):
        reopen_version(project / "v3")


def test_version_of_a_checkpoint(run: Run, project: Path, tmp_path: Path) -> None:
    for place in ("v0/checkpoint-0-5", "v0/superseded/checkpoint-0-5.1"):
        (project / place).mkdir(parents=True)
        assert versions.version_of(project, project / place) == run.path
    elsewhere = tmp_path / "copies" / "v0" / "checkpoint-0-5"
    elsewhere.mkdir(parents=True)
    assert versions.version_of(project, elsewhere) is None


# Links

LEVELS = ["output", "project", "version", "checkpoint"]


def moved_away(project: Path, level: str) -> Path:
    """Move a folder of the run to another disk and link it back; returns the new place."""
    place = {"output": project.parent, "project": project, "version": project / "v0",
             "checkpoint": project / "v0" / "checkpoint-0-3"}[level]  # fmt: skip
    away = project.parent.parent / "large disk" / f"{place.name} kept"
    away.parent.mkdir(exist_ok=True)
    os.rename(place, away)
    place.symlink_to(away if level != "checkpoint" else os.path.relpath(away, place.parent))
    return away


@pytest.mark.parametrize("level", LEVELS)
def test_what_was_moved_away_and_linked_back_is_the_same_version(level: str, project: Path) -> None:
    """However it is named, it is found, reopened in its place, and neither tidied nor thinned out."""
    path = end(project, 3, "finished")
    add_checkpoint(path, 1)
    newest = add_checkpoint(path, 3)
    away = moved_away(project, level)
    specs = ["latest", str(newest), str(newest.resolve()), str(path)]
    for spec in specs:
        found = find_checkpoint(project, spec, pytest.fail)
        assert found == newest, spec
        assert versions.version_of(project, found) == path
    run = reopen_version(path)
    run.record(4, {"loss": 1.0})
    add_checkpoint(path, 4)
    retention(run, 1)
    assert steps(run) == ([3, 4] if level == "checkpoint" else [4])
    run.rewind(2)
    assert verify_folder(path / "superseded" / "checkpoint-0-4.1") is None
    if level == "checkpoint":
        assert verify_folder(path / "superseded" / "checkpoint-0-3.1") is None and verify_folder(away) is None
    run.finish("finished", 2)
    run.close()
    claim_version(project).close()
    held = level in ("version", "checkpoint")
    assert (path / "metrics.jsonl").exists() == held, "what is short, finished and no link makes way"
    assert away.exists()


@pytest.mark.parametrize("holder", ["output", "project", "other version", "needed"])
def test_what_a_link_leads_to_is_not_tidied_away(holder: str, project: Path) -> None:
    other = end(project, 9)
    path = end(project, 3, "finished")
    kept = add_checkpoint(path, 3)
    place = {"output": project.parent, "project": project, "other version": other, "needed": None}[holder]
    if place is not None:
        (place / "best").symlink_to(os.path.relpath(kept, place))
    claim_version(project, [kept / "state"] if place is None else []).close()
    assert verify_folder(kept) is None
    if holder == "project":
        run = reopen_version(path)
        add_checkpoint(path, 4)
        add_checkpoint(path, 5)
        retention(run, 1)
        run.close()
        assert steps(run) == [3, 5]


def test_a_link_that_stays_inside_its_version_holds_nothing(project: Path) -> None:
    """Trackers make such: wandb/latest-run."""
    path = end(project, 2)
    (path / "latest").symlink_to("metrics.jsonl")
    claim_version(project).close()
    assert not (path / "latest").is_symlink()


def test_a_checkpoint_is_replaced_where_its_link_stands(run: Run, project: Path) -> None:
    old = add_checkpoint(run.path, 3)
    away = moved_away(project, "checkpoint")
    with staged_folder(old) as folder:
        (folder / "state").write_bytes(b"new")
    assert not old.is_symlink() and (old / "state").read_bytes() == b"new"
    assert verify_folder(away) is None and (away / "state").read_bytes() != b"new"
    assert {path.name for path in run.path.iterdir()} == {"checkpoint-0-3", "run.json", "run.lock"}


def test_a_file_is_written_where_its_link_leads(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


# What a checkpoint calls itself


def test_a_checkpoint_under_the_name_of_another_step_is_not_believed(run: Run, project: Path, tmp_path: Path) -> None:
    sound = add_checkpoint(run.path, 2)
    false = Path(shutil.copytree(sound, run.path / "checkpoint-0-50"))
    said: list[str] = []
    assert find_checkpoint(project, "latest", said.append) == sound
    assert len(said) == 1 and "checkpoint-0-50 was written as checkpoint-0-2" in said[0]
    with pytest.raises(RunError, match="was written as checkpoint-0-2"):
        find_checkpoint(project, str(false), pytest.fail)
    assert steps(run) == [2]
    own = Path(shutil.copytree(sound, tmp_path / "my best one"))  # a name that says no step
    assert find_checkpoint(project, str(own), pytest.fail) == own
    # The name stands inside what the checksum covers.
    table = false / "manifest.json"
    table.write_text(table.read_text().replace("checkpoint-0-2", "checkpoint-0-50"))
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        find_checkpoint(project, str(false), pytest.fail)


def test_checkpoints_of_before_names_were_kept_are_read(run: Run, project: Path) -> None:
    folder = add_checkpoint(run.path, 2)
    found = json.loads((folder / "manifest.json").read_text())
    own = hashlib.sha256(json.dumps(found["files"], sort_keys=True).encode()).hexdigest()
    old = json.dumps({"files": found["files"], "sha256": own}, indent=1, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(old)
    assert find_checkpoint(project, "latest", pytest.fail) == folder


# Files that are none of ours


@pytest.mark.timeout(60)
def test_pipes_are_not_waited_for(run: Run, project: Path) -> None:
    folder = add_checkpoint(run.path, 2)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    said: list[str] = []
    assert find_checkpoint(project, "latest", said.append) is None
    assert "manifest.json is no regular file" in said[0]
    run.close()
    os.mkfifo(run.path / "metrics.jsonl")
    with pytest.raises(RunError, match=r"metrics\.jsonl is no regular file"):
        reopen_version(run.path)
    claim_version(project).close()
    assert (run.path / "metrics.jsonl").exists(), "nobody can say what it is worth"


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[]", '{"step": "3"}', '{"step": 3, "checkpoint": 7, "losses": []}', "1" * 6000]
)
def test_a_damaged_best_is_one_clear_error(run: Run, text: str) -> None:
    (run.path / "best.json").write_text(text)
    run.close()
    with pytest.raises(RunError, match=r"best\.json is damaged.*put best\.json back from a copy, or remove it"):
        reopen_version(run.path)
    (run.path / "best.json").unlink()
    reopen_version(run.path).close()


def test_metrics_that_are_no_numbers(run: Run) -> None:
    path = run.path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n' + "[" * 100_000 + '\n{"step": true}\n{"step": 2, "loss": "much"}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged: a value of step 2 is no number"):
        history.read_metrics(run.path)
    run.truncate_metrics(1)
    assert history.read_metrics(run.path) == [{"step": 1, "loss": 1.0}]


def test_a_damaged_state_is_no_reason_to_remove_what_can_be_resumed(project: Path) -> None:
    path = end(project, 3, "interrupted", 3)
    (path / "run.json").write_text('{"state"')
    claim_version(project).close()
    assert outcome(path) == "unknown" and verify_folder(path / "checkpoint-0-3") is None


# Metrics and state


def test_metrics_come_back(run: Run) -> None:
    run.record(1, {"loss": 0.1, "grad_norm": 1e-30})
    run.record(2, {"loss": math.nan, "grad_norm": -math.inf})
    first, second = history.read_metrics(run.path)
    assert first == {"step": 1, "loss": 0.1, "grad_norm": 1e-30}
    assert math.isnan(second["loss"])
    assert second["grad_norm"] == -math.inf
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_truncating_metrics_equals_never_having_logged_more(run: Run) -> None:
    path = run.path / "metrics.jsonl"
    for step in range(1, 6):
        run.record(step, {"loss": 1 / step})
    run.truncate_metrics(9)
    expected = path.read_bytes()
    for step in range(6, 9):
        run.record(step, {"loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # torn
    run.truncate_metrics(5)
    assert path.read_bytes() == expected
    run.record(6, {"loss": 1 / 6})
    assert [line["step"] for line in history.read_metrics(run.path)] == [1, 2, 3, 4, 5, 6]


def test_a_line_that_does_not_fit_leaves_no_part_of_itself(run: Run) -> None:
    """A limit on the size of files cuts the write short, as a full disk does."""
    import resource

    run.record(1, {"loss": 1.0})
    before = (run.path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(DiskFull, match=r"metrics\.jsonl"):
            run.record(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_finish_says_how_it_stands(run: Run) -> None:
    run.finish("interrupted", 7)
    assert json.loads((run.path / "run.json").read_text()) == {"state": "interrupted", "step": 7}
    assert history.steps_of(run.path) == 7


# Checkpoints


def test_how_a_version_ended(run: Run, project: Path) -> None:
    add_checkpoint(run.path, 6)
    assert (outcome(run.path), unfinished(project)) == ("running", None)
    run.close()  # as the end of a process does, with or without a word
    assert (outcome(run.path), unfinished(project)) == ("killed", run.path)
    again = reopen_version(run.path)
    again.finish("interrupted", 7)
    again.close()
    assert (outcome(run.path), unfinished(project)) == ("interrupted", run.path)
    again = reopen_version(run.path)
    again.finish("finished", 9)
    again.close()
    assert (outcome(run.path), unfinished(project)) == ("finished", None)
    assert outcome(project) == "unknown"


def test_checkpoints_are_ordered_by_step_whatever_the_clock_said(run: Run) -> None:
    steps = [100, 9, 20, 1000]
    for index, step in enumerate(steps):
        folder = add_checkpoint(run.path, step, epoch=step // 10)
        year = 365 * 24 * 3600 * (-1) ** index
        for path in (folder, *folder.iterdir()):
            os.utime(path, (time.time() + year, time.time() + year))
    (run.path / "checkpoint-0-5000").mkdir()  # not complete
    (run.path / "checkpoint-best").mkdir()
    assert [folder.name for folder in run.checkpoints()] == [
        "checkpoint-0-9", "checkpoint-2-20", "checkpoint-10-100", "checkpoint-100-1000",
    ]  # fmt: skip
    assert run.checkpoint_path(2, 20) == run.checkpoints()[1]


def test_latest_is_the_highest_version_then_the_highest_step(project: Path) -> None:
    said: list[str] = []
    assert find_checkpoint(project, "latest", said.append) is None
    for number, steps in ((0, (500, 600)), (2, (90, 100)), (10, (7, 8)), (11, ())):
        (project / f"v{number}").mkdir(parents=True)
        for step in steps:
            add_checkpoint(project / f"v{number}", step)
    os.utime(project / "v0" / "checkpoint-0-600", (2**32, 2**32))
    assert find_checkpoint(project, "latest", said.append) == project / "v10" / "checkpoint-0-8"
    assert said == []


def test_latest_falls_back_over_damage_and_says_so(project: Path) -> None:
    path = end(project, 9)
    for step in (5, 6, 7, 8):
        add_checkpoint(path, step)
    damage(path / "checkpoint-0-8")
    (path / "checkpoint-0-7" / "state").unlink()
    shutil.rmtree(path / "checkpoint-0-6")
    (path / "checkpoint-0-6").mkdir()
    said: list[str] = []
    assert find_checkpoint(project, "latest", said.append) == path / "checkpoint-0-5"
    assert ["checkpoint-0-8" in said[0], "checkpoint-0-7" in said[1], "checkpoint-0-6" in said[2]] == [True] * 3
    assert "checksum" in said[0]
    damage(path / "checkpoint-0-5")
    assert find_checkpoint(project, "latest", said.append) is None


def test_a_named_checkpoint(project: Path) -> None:
    path = end(project, 9)
    good, bad = add_checkpoint(path, 5), add_checkpoint(path, 8)
    damage(bad)
    warn = pytest.fail
    assert find_checkpoint(project, str(good), warn) == good
    newest = re.escape(f"the newest valid checkpoint there is {good}")
    with pytest.raises(RunError, match=rf"resume_from_checkpoint=.*checkpoint-0-8.*its checksum differs.*{newest}"):
        find_checkpoint(project, str(bad), warn)
    with pytest.raises(RunError, match=rf"checkpoint-0-9 is not a folder; {newest}"):
        find_checkpoint(project, str(path / "checkpoint-0-9"), warn)
    said: list[str] = []
    assert find_checkpoint(project, str(path), said.append) == good  # of a version, its newest
    assert len(said) == 1 and "checkpoint-0-8" in said[0]
    with pytest.raises(RunError, match="has no valid checkpoint"):
        find_checkpoint(project, "/nowhere/checkpoint-0-9", warn)


def test_weights_alone_are_for_pretrained_weight(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-0-100"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(RunError, match=r"set model\.lora\.pretrained_weight to it instead"):
        find_checkpoint(tmp_path, str(folder), pytest.fail)


def test_rewind_sets_later_checkpoints_and_samples_aside(run: Run, project: Path) -> None:
    for step in range(1, 10):
        run.record(step, {"loss": 1.0})
    for step in (4, 6, 8):
        add_checkpoint(run.path, step)
    for name in ("base", "step-4", "step-5"):
        (run.path / "samples" / name).mkdir(parents=True)
    for count in (1, 2):
        run.rewind(4)
        assert sorted(os.listdir(run.path / "samples")) == ["base", "step-4"]
        assert (run.path / "superseded" / "step-5.1").is_dir()
        assert [folder.name for folder in run.checkpoints()] == ["checkpoint-0-4"]
        assert [line["step"] for line in history.read_metrics(run.path)] == [1, 2, 3, 4]
        assert (run.path / "superseded" / f"checkpoint-0-6.{count}").is_dir()
        add_checkpoint(run.path, 6)
    assert verify_folder(run.path / "superseded" / "checkpoint-0-8.1") is None
    assert find_checkpoint(project, "latest", pytest.fail) == run.path / "checkpoint-0-6"


def test_a_resume_sets_nothing_half_written_aside(run: Run) -> None:
    """A picture that a killed process was writing goes before its folder moves, where nobody would look for it."""
    add_checkpoint(run.path, 2)
    for name in ("", "step-3"):
        folder = run.path / "samples" / name
        folder.mkdir(exist_ok=True)
        (folder / "0.png").touch()
        files.hidden(folder / "0.png", "partial").touch()
    run.close()
    again = reopen_version(run.path)
    again.rewind(2)
    assert [path.name for path in run.path.rglob(".*.partial-*")] == []
    assert os.listdir(run.path / "superseded" / "step-3.1") == ["0.png"]


# Retention


def steps(run: Run) -> list[int]:
    return [int(folder.name.rpartition("-")[2]) for folder in run.checkpoints()]


def test_retention_keeps_the_newest(run: Run) -> None:
    for step in (3, 20, 100, 9):
        add_checkpoint(run.path, step)
    retention(run, None)
    assert steps(run) == [3, 9, 20, 100]
    retention(run, 2)
    assert steps(run) == [20, 100]
    retention(run, 5)
    assert steps(run) == [20, 100]


def test_retention_counts_only_sound_checkpoints(run: Run) -> None:
    for step in (1, 2, 3, 4):
        add_checkpoint(run.path, step)
    retention(run, 4)  # verified once ...
    damage(run.path / "checkpoint-0-4")  # ... and damaged since
    retention(run, 2)
    assert steps(run) == [2, 3, 4]
    assert [verify_folder(folder) is None for folder in run.checkpoints()] == [True, True, False]


def test_retention_reads_unchanged_checkpoints_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        add_checkpoint(run.path, step)
    retention(run, 3)
    monkeypatch.setattr(manifest, "_checksum", lambda path: pytest.fail(f"{path} is read again"))
    retention(run, 3)


def test_retention_killed_at_any_moment(project: Path) -> None:
    """A process that saves and deletes is killed again and again: never fewer valid checkpoints than the limit."""
    path = end(project, 5, "running")
    for step in (1, 2):
        add_checkpoint(path, step)
    chance = random.Random(1)
    last = 2
    for number in range(200 if FULL else 20):
        process = spawn(
            """
            run = runs.reopen_version(Path(sys.argv[1]))
            print(flush=True)
            step = int(run.checkpoints()[-1].name.rpartition("-")[2])
            while True:
                step += 1
                with files.staged_folder(run.checkpoint_path(0, step)) as folder:
                    (folder / "state").write_bytes(bytes([step % 256]) * 100_000)
                print(flush=True)
                runs.retention(run, 2)
            """,
            path,
        )
        assert process.stdout is not None
        for _ in range(1 + number % 2):  # every other one has saved by then, on a slow disk too
            process.stdout.readline()
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.communicate()
        folders = [folder for folder in path.glob("checkpoint-*") if verify_folder(folder) is None]
        assert len(folders) >= 2
        assert len(list(path.glob("checkpoint-*"))) == len(folders), "nothing half-written looks like a checkpoint"
        found = find_checkpoint(project, "latest", pytest.fail)
        assert found is not None
        step = int(found.name.rpartition("-")[2])
        assert step >= last
        last = step
    assert last > 2
