"""What a run leaves behind: its version folder with metrics, curves and checkpoints, and how it ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwen_image_finetune.config import Config
from qwen_image_finetune.data import left_out
from qwen_image_finetune.disk import checkpoint, history, runs, versions
from qwen_image_finetune.disk.files import DiskFull, is_disk_full, write_atomic
from qwen_image_finetune.encoding import remembered
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.machine import console, journal, processes
from qwen_image_finetune.machine.environment import environment
from qwen_image_finetune.training.content import CONTENT, changes, digest, run_content
from qwen_image_finetune.training.job import Job
from qwen_image_finetune.training.state import Progress, State, check_resume, settings
from qwen_image_finetune.training.trackers import Trackers


class Logbook:
    """Where a run is written. The first process writes; the others keep it company where it needs their part."""

    def __init__(self, job: Job, progress: Progress) -> None:
        """
        Raises:
            ConfigError: the checkpoint to resume is of another run.
            RunError: the version to resume is in use, or no version can be made.
        """
        config, team = job.config, job.team
        # One process looks, so that all see the same.
        found = team.share(lambda: find_resume(config, job.say), "looking for a checkpoint")
        self.job, self.progress, self.settings = job, progress, settings(job)
        self.content = run_content(job) if team.main else {}
        self.resume = None if found is None else Path(found)  # checkpoint to continue
        saved = {} if self.resume is None else check_resume(job, self.settings, self.resume)
        self.done = int(saved.get("step", 0))  # steps
        project = config.logging.project_dir
        continued = None if self.resume is None else versions.version_of(project, self.resume)
        self.settings[CONTENT] = team.share(lambda: digest(self.content), "reading the data")
        if team.main and saved.get(CONTENT, self.settings[CONTENT]) != self.settings[CONTENT]:
            console.note(f"the data is not what {self.resume} was trained on: {changes(continued, self.content)}; from "
                         "here on it is not the run that it would have been")  # fmt: skip
        self.run = open_run(config, continued) if team.main else None
        if self.run is not None:
            journal.keep_in(self.run.log)
        # A checkpoint is saved before it is validated: its round may not have come to its end.
        due = continued is not None and job.due(self.done).validates
        self.owes_round = due and team.share(lambda: self._lacks_round(self.done), "looking for a round of validation")
        self.trackers: Trackers | None = None
        self.writer = checkpoint.CheckpointWriter()

    @property
    def path(self) -> Path | None:
        """The version folder; None in all processes but the first."""
        return None if self.run is None else self.run.path

    def _lacks_round(self, step: int) -> bool:
        return self.run is not None and not history.has_round(self.run.path, step)

    def begin(self) -> None:
        """What is known once the run is about to train: configuration as it was decided, pairs, versions, device."""
        if self.run is None:
            return
        config, step = self.job.config, self.progress.step
        self.run.rewind(step)
        write_atomic(self.run.path / "config.yaml", config.to_yaml())
        write_atomic(self.run.path / history.DATA, json.dumps(self.content, ensure_ascii=False) + "\n")
        made_with = environment(device_words(self.job.accelerator.device), self.job.team.size)
        write_atomic(self.run.path / history.ENVIRONMENT, json.dumps(made_with) + "\n")
        pairs, files = self.job.pairs, self.job.rows.fingerprints
        left_out.write(self.run.path, pairs.training.left_out)
        remembered.remember(self.run.path, pairs.training, pairs.held_out, files.file)
        self.trackers = Trackers(config, self.run.path, step or None)

    def record(self, values: Mapping[str, float], sigmas: Sequence[Tensor]) -> None:
        """One line of metrics and one point of every curve, for the step that was just done."""
        if self.run is not None and self.trackers is not None:
            self.run.record(self.progress.step, values)
            self.trackers.scalars(values, self.progress.step)
            self.trackers.collect("sigma", sigmas, self.progress.step)

    def checkpoint_path(self) -> Path | None:
        """Where this step is saved, if it is."""
        if self.run is None:
            return None
        step = self.progress.step
        return self.run.checkpoint_path(self.job.batches.epoch_of(max(step - 1, 0)), step)

    def written_checkpoint(self) -> Path | None:
        """The same, once it stands there as a whole."""
        self.writer.wait()
        return self.checkpoint_path()

    def save(self, state: State, wait: bool = False) -> None:
        """Copy the state to the host and write it behind the loop's back; `wait` for the last one of a run."""
        run, final, limit = self.run, self.checkpoint_path(), self.job.config.train.checkpoints_total_limit
        if run is not None and final is not None:
            snapshot = state.snapshot()
            self.writer.submit(
                final,
                lambda folder: state.write(folder, snapshot),
                lambda: runs.retention(run, limit),
                needed=checkpoint.num_bytes(snapshot),
            )
            if wait:
                self.writer.wait()
        elif parallel.is_sharded(state.learner.transformer):
            state.snapshot(keep=False)
        self.job.team.meet("saving a checkpoint")

    def close(self, outcome: runs.State) -> None:
        """Let go of everything. Each part ends whatever becomes of the others."""
        with contextlib.ExitStack() as ending:
            if self.run is not None:
                ending.callback(self.run.close)
                ending.callback(_finish, self.run, outcome, self.progress.step)
            if self.trackers is not None:
                ending.callback(self.trackers.close)
            ending.callback(self.writer.settle)


@contextlib.contextmanager
def open_logbook(job: Job, progress: Progress) -> Iterator[Logbook]:
    """The logbook of a run; however the block is left, it is written there. What went wrong first is raised.

    Raises:
        DiskFull: in place of whatever a full disk raised in the block.
    """
    book = Logbook(job, progress)
    outcome: runs.State = "failed"
    try:
        yield book
        outcome = "finished"
    except SystemExit:
        outcome = "interrupted"
        raise
    except OSError as error:
        if is_disk_full(error) and not isinstance(error, DiskFull):
            raise DiskFull(Path(error.filename or job.config.logging.project_dir)) from error
        raise
    finally:
        if outcome == "failed":
            processes.abandon()
        book.close(outcome)


def _finish(run: runs.Run, outcome: runs.State, step: int) -> None:
    """Write how a run ended. On a full disk it reads as killed, which can be resumed just as well."""
    try:
        run.finish(outcome, step)
    except DiskFull as error:
        console.say(str(error))


def find_resume(config: Config, say: Callable[[str], None]) -> str | None:
    """Folder of the checkpoint to continue, verified; None for a fresh start."""
    spec = config.train.resume_from_checkpoint
    if spec is None:
        return None
    found = versions.find_checkpoint(config.logging.project_dir, spec, say)
    if found is None:
        say(f"no complete checkpoint in {config.logging.project_dir}: starting afresh")
        return None
    return str(found)


def open_run(config: Config, continued: Path | None) -> runs.Run:
    """A new version, or the one that is continued."""
    project, file = config.logging.project_dir, config.model.transformer_path
    if continued is not None:
        return runs.reopen_version(continued)
    if (before := runs.unfinished(project)) is not None:
        console.say(f"note: {before} ended at step {history.steps_of(before)} without finishing; this is a new run, "
                    "and train.resume_from_checkpoint=latest would go on with that one")  # fmt: skip
    # What it starts from may lie in a version that would make way.
    needed = [Path(lora).expanduser() for _, lora in config.model.loras]
    return runs.claim_version(project, needed if file is None else [*needed, file])


def memory_gib(device: torch.device) -> float:
    """Peak memory of the accelerator, or of the process on a CPU, in GiB."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.accelerator.max_memory_allocated(device) / 2**30


def device_words(device: torch.device) -> str:
    """The device as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
