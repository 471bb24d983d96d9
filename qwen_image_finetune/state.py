"""What a checkpoint holds and a resumed run gets back, as named parts: weights, optimizer, schedule, and one number."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qwen_image_finetune import checkpoint
from qwen_image_finetune.assembly import Learner
from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.job import Job
from qwen_image_finetune.levers import parallel, trained
from qwen_image_finetune.levers.lora_files import run_metadata
from qwen_image_finetune.optim import optimizer_state, restore_optimizer


@dataclass
class Progress:
    """Where a run is. Order of the data and noise are functions of it, so a resume needs nothing else of them."""

    step: int = 0  # optimizer steps done
    bad_steps: int = 0  # steps in a row that were skipped because of a non-finite loss or gradient


class State:
    """Everything a resume needs, as named parts."""

    def __init__(self, job: Job, learner: Learner, progress: Progress) -> None:
        self.job, self.learner, self.progress = job, learner, progress

    def snapshot(self, keep: bool = True) -> dict[str, Any]:
        """Copies on the CPU of what changes from step to step; the loop may go on while they are written.

        Args:
            keep: False where another process writes: this one only gives its part of a model that is shared.
        """
        scaler = self.job.accelerator.scaler
        parts = {
            "optimizer": parallel.gathered(optimizer_state(self.learner.optimizer.optimizer), keep),
            "schedule": self.learner.schedule.state_dict(),
            "progress": {
                **asdict(self.progress),
                "seed": self.job.config.train.seed,
                "micro_batches_per_step": self.job.micro_batches_per_step,
            },
            **({} if scaler is None else {"scaler": scaler.state_dict()}),
        }
        return {
            "parts": checkpoint.snapshot(parts),
            "weights": trained.snapshot(self.learner.transformer, self.job.config.model, keep),
        }

    def write(self, folder: Path, snapshot: dict[str, Any]) -> None:
        """Write a snapshot into a staged folder."""
        about = self.metadata(snapshot["parts"]["progress"]["step"])
        trained.save(folder, self.learner.transformer, snapshot["weights"], self.job.config.model, about)
        checkpoint.save_state(folder, snapshot["parts"])

    def metadata(self, step: int) -> dict[str, str]:
        """What the weights file of a step says about itself."""
        train, family = self.job.config.train, self.job.family
        sampling = {"num_inference_steps": family.num_inference_steps, "guidance_scale": family.guidance_scale}
        return {
            **run_metadata(self.job.config, step),
            "qif.family": family.name,
            "qif.sigma_distribution": train.sigma_distribution,
            "qif.sigma_shift": str(train.sigma_shift),
            "qif.guidance_scale": str(train.guidance_scale),
            "qif.sampling": json.dumps(sampling),
        }

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder, which was verified when it was found.

        Raises:
            CheckpointError: a file is not what was written there.
            ConfigError: the checkpoint is of another model, optimizer, seed or number of batches a step.
        """
        learner = self.learner
        try:
            trained.load(folder, learner.transformer, self.job.config.model)
        except SafetensorError as error:
            raise checkpoint.CheckpointError(f"{folder}: its weights cannot be read: {error}") from error
        progress = checkpoint.load_state(folder, "progress")
        self._check(folder, progress)
        saved = checkpoint.load_state(folder, "optimizer")
        saved["state"] = parallel.cut_state(saved["state"], learner.optimizer.optimizer)
        for note in restore_optimizer(learner.optimizer.optimizer, saved):
            self.job.say(f"note: {note}")
        schedule = learner.schedule
        schedule.load_state_dict(checkpoint.load_state(folder, "schedule"))
        # The optimizer came with the rate that the schedule of then had for the next step; this run's may be longer.
        groups = learner.optimizer.param_groups
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)
        if self.job.accelerator.scaler is not None:
            self.job.accelerator.scaler.load_state_dict(checkpoint.load_state(folder, "scaler"))
        self.progress.step, self.progress.bad_steps = progress["step"], progress["bad_steps"]

    def _check(self, folder: Path, saved: dict[str, Any]) -> None:
        """Raises ConfigError where the order of the data and noise would change in the middle of the run."""
        train, job = self.job.config.train, self.job
        if saved["seed"] != train.seed:
            raise ConfigError(
                f"train.seed={train.seed}, but {folder} was trained with {saved['seed']}: order of the data and noise "
                "would change in the middle of the run; set the seed back or start afresh"
            )
        per_step = saved["micro_batches_per_step"]
        if per_step != job.micro_batches_per_step:
            raise ConfigError(
                f"{folder} was trained with {per_step} batches a step (accumulation times processes); "
                f"train.gradient_accumulation_steps={train.gradient_accumulation_steps} with {job.team.size} processes "
                f"makes {job.micro_batches_per_step}: order of the data and length of the run would change; set it so "
                f"that the product is {per_step}"
            )
