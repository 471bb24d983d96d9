"""What a person at a terminal wants to know of a run: before it, at every step, and what to do with it afterwards."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from qwen_image_finetune.disk import history, versions
from qwen_image_finetune.training.job import Job

SMOOTHING = 0.98  # of the loss, whose single values are mostly the noise level that a step happened to draw

Rows = list[tuple[str, str]]


class Outlook:
    """The words of the live line. The smoothed loss begins anew where a run is resumed."""

    def __init__(self, job: Job) -> None:
        self.job, self._sum, self._weight = job, 0.0, 0.0

    def __call__(self, values: Mapping[str, float], step: int) -> list[str]:
        """What is said after a step (1-based), the most important first."""
        if math.isfinite(values["loss"]):
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * values["loss"]
            self._weight = SMOOTHING * self._weight + 1 - SMOOTHING
        words = [f"loss {self._sum / self._weight:.4f}"] if self._weight else []
        words += [f"lr {values['learning_rate']:.3g}", f"{values['memory_gib']:.1f} GiB"]
        left = self.next_checkpoint(step) - step
        return [*words, f"checkpoint in {left:,}"] if left else words

    def next_checkpoint(self, step: int) -> int:
        """The step that is saved next, `step` itself at the end of the run."""
        every = self.job.config.train.checkpointing_steps
        return min((step // every + 1) * every, self.job.total_steps)


def before(job: Job, path: Path | None) -> Rows:
    """What is about to be trained."""
    config, lora, file = job.config, job.config.model.lora, job.config.model.transformer_file
    held_out = len(job.pairs.held_out) if job.pairs.held_out is not None else 0
    rate = config.optimizer.init_args.get("lr")
    trained = "every weight of the transformer" if lora is None else f"a LoRA of rank {lora.r}"
    return [
        ("model", config.model.pretrained_model_name_or_path),
        *([] if file is None else [("transformer", file)]),
        *(("base LoRA", f"{one.file} at {one.strength:g}") for one in config.model.base_loras),
        ("trains", trained if rate is None else f"{trained}, learning rate {rate:g}"),
        ("pairs", f"{len(job.pairs.training)}" + (f", {held_out} more held out" if held_out else "")),
        ("steps", f"{job.total_steps:,}, a checkpoint every {config.train.checkpointing_steps:,}"),
        ("writes", str(path)),
        ("watch", f"tensorboard --logdir {shlex.quote(str(config.logging.project_dir))}"),
    ]  # fmt: skip


def after(job: Job, path: Path) -> Rows:
    """What was trained, and the three commands that come next."""
    best, folders = history.read_best(path), versions.checkpoint_folders(path)
    known = best is not None and (path / best["checkpoint"]).is_dir()
    chosen = path / best["checkpoint"] if best is not None and known else folders[-1] if folders else path
    run, given = shlex.quote(str(path)), shlex.quote(str(chosen))
    measured = f"held-out loss {best['held_out_loss']:.4f}" if best is not None and "held_out_loss" in best else ""
    rows = [("checkpoint", f"{chosen} (the best: {measured})" if known and measured else str(chosen))]
    judged = f"qif evaluate {run}" if job.held_out is not None else f"qif evaluate {run} FOLDER_OF_NEW_PAIRS"
    exported = f"qif export {given} lora.safetensors --family {job.family.name}"
    return [*rows, ("next", judged), ("", f"qif report {run}"), ("", exported)]
