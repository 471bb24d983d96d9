"""What a checkpoint holds and a resumed run gets back, as named parts: weights, optimizer, schedule, and one number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qwen_image_finetune.config import ConfigError, DataEntry, EmaConfig, LossConfig, ModelConfig, PreservationConfig
from qwen_image_finetune.config.tree import ABSENT, find, shown
from qwen_image_finetune.disk import checkpoint
from qwen_image_finetune.disk.files import Staged
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.loading import pipeline_config
from qwen_image_finetune.lora.metadata import run_metadata
from qwen_image_finetune.lora.sources import find_lora
from qwen_image_finetune.training import trained
from qwen_image_finetune.training.assembly import Learner
from qwen_image_finetune.training.job import Job
from qwen_image_finetune.training.optim import optimizer_state, restore_optimizer

SET_IT_BACK = "set it back, or start afresh"

# What a run cannot go on with in another way: why, and what to do
FIXED = {
    "seed": f"order of the data and noise would change in the middle of the run; {SET_IT_BACK}",
    "micro_batches_per_step": "order of the data and length of the run would change; set them so that their product is "
    "the same",
    "base": "what was learnt belongs to that base; to go on from it with another one, start a run with "
    "model.lora.pretrained_weight",
    "model.lora.r": f"the adapter has that rank; {SET_IT_BACK}",
    **dict.fromkeys(
        ("model.lora.lora_alpha", "model.lora.alpha_pattern", "model.lora.use_rslora"),
        f"what was learnt so far would be scaled by another factor; {SET_IT_BACK}",
    ),
    **dict.fromkeys(
        tuple(
            f"model.lora.{key}" for key in ("type", "use_dora", "rank_pattern", "decompose_factor", "oft_block_size")
        ),
        f"the adapter has other weights then; {SET_IT_BACK}",
    ),
    "model.lora.lr_ratio": f"the state of the optimizer has that rate; {SET_IT_BACK}",
}
# What may change in the middle of a run, but makes it another one than without a break.
FREE = (
    "model.quantize", *(f"model.lora.{key}" for key in ("lora_dropout", "rank_dropout", "module_dropout", "max_norm")),
    "data.batch_size", "data.shuffle", "cache.prompt_empty_drop_keys",
    *(f"data.init_args.{key}" for key in (
        "caption_dropout_rate", "prompt_image_dropout_rate", "image_size", "resolution", "max_buckets", "center_crop",
        "center_crop_ratio", "random_crop", "crop_size", "crop_scale", "random_flip")),
    *(f"train.{key}" for key in (
        "mixed_precision", "weight_precision", "max_grad_norm", "sigma_distribution", "sigma_shift",
        "sigma_stratified", "guidance_scale")),
    *(f"train.ema.{key}" for key in EmaConfig.model_fields if key != "device"),
    *(f"loss.{key}" for key in LossConfig.model_fields if key != "preservation"),
    *(f"loss.preservation.{key}" for key in PreservationConfig.model_fields if key != "dataset_path"),
)  # fmt: skip
NAMES = {  # of what is stored under a name that is no key
    "seed": "train.seed",
    "micro_batches_per_step": "train.gradient_accumulation_steps times processes",
    "base": "the sum over the files of the base (its transformer, model.transformer_file, model.base_loras)",
    "pairs": "the number of pairs",
    "sets": "what data sets have of their own (weights, sizes, dropouts)",
    "visits": "the number of visits in an epoch (repeats of the data sets)",
    "variations": "the number of crops and flips of each sample",
}

TRAINED = "trained"  # part of a checkpoint: weights that gradients are taken at, where others are to be used
AVERAGED = "averaged"  # in a checkpoint with a moving average: its updates so far


@dataclass
class Progress:
    """Where a run is. Order of the data and noise are functions of it, so a resume needs nothing else of them."""

    step: int = 0  # optimizer steps done
    bad_steps: int = 0  # steps in a row that were skipped because of a non-finite loss or gradient


def settings(job: Job) -> dict[str, Any]:
    """What a resume compares, by key; nothing of where files lie or of how the processes are laid out."""
    values = job.config.model_dump(mode="json")
    kept = {key: value for key in (*FIXED, *FREE) if (value := find(values, key)) is not ABSENT}
    if job.config.model.lora is not None:  # a full fine-tune brings its whole model along
        kept["base"] = base_sum(job.folder, job.config.model)
    cached = job.config.cache.use_cache and job.config.data.is_random
    kept["variations"] = job.config.cache.num_variations if cached else None  # without the cache all are new
    kept["seed"], kept["micro_batches_per_step"] = job.config.train.seed, job.micro_batches_per_step
    rows = job.rows.dataset.rows
    kept["sets"] = _sets(job.config.data.init_args.entries)
    return {**kept, "pairs": len(rows), "visits": job.batches.visits}


def _sets(entries: Sequence[DataEntry]) -> list[dict[str, Any]] | None:
    """What data sets have of their own, but for where they are and what their content tells; None without any."""
    told = {"path", "columns", "split", "prefix", "prompt_per_line", "identity", "repeats"}
    own = [entry.model_dump(mode="json", exclude=told, exclude_defaults=True) for entry in entries]
    return own if any(own) else None


def base_sum(checkpoint: Path, model: ModelConfig) -> str:
    """A sum over the files that the frozen base is made of, and the strengths of the LoRAs among them."""
    file = model.transformer_path
    parts = [sampled([file] if file is not None else sorted((checkpoint / "transformer").glob("*.safetensors")))]
    parts += [f"{sampled([find_lora(one.file)])} at {one.strength:g}" for one in model.base_loras]
    return " + ".join(parts)


def sampled(files: Iterable[Path]) -> str:
    """A sum over sizes and small parts of files: tells models apart without reading them."""
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for place in range(16):
                file.seek(size * place // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _named(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_resume(job: Job, now: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Compare a checkpoint with the run that is to go on from it, before any model loads.

    What is not in the checkpoint, as older ones have less, is taken for the same.

    Args:
        now: the `settings` of the run.

    Returns:
        What the checkpoint says: `step`, and more by the keys of `settings`.

    Raises:
        CheckpointError: the file is not what was written there.
        ConfigError: the run cannot go on from it; with everything that differs.
    """
    trained.check_kind(folder, job.config.model)
    saved, problems = checkpoint.load_state(folder, "progress"), []
    for key, value in now.items():
        old = saved.get(key, value)
        if old == value:
            continue
        differs = f"{NAMES.get(key, key)}={shown(value)}, but {folder} was trained with {shown(old)}"
        if key in FIXED:
            problems.append(f"{differs}: {FIXED[key]}")
        else:
            job.say(f"note: {differs}: from here on it is not the run that it would have been without a break")
    if problems:
        raise ConfigError("\n".join(problems))
    return dict(saved)


class State:
    """Everything a resume needs, as named parts."""

    def __init__(self, job: Job, learner: Learner, progress: Progress, kept: Mapping[str, Any]) -> None:
        """
        Args:
            kept: the `settings` of the run.
        """
        self.job, self.learner, self.progress, self.settings = job, learner, progress, kept

    def snapshot(self, keep: bool = True) -> dict[str, Any]:
        """Copies on the CPU of what changes from step to step; the loop may go on while they are written.

        Args:
            keep: False where another process writes: this one only gives its part of a model that is shared.
        """
        learner, scaler = self.learner, self.job.accelerator.scaler
        average = learner.average if learner.average is not None and learner.average.updates else None
        parts = {
            "optimizer": optimizer_state(learner.optimizer.optimizer),
            "schedule": learner.schedule.state_dict(),
            "progress": {**asdict(self.progress), **self.settings},
            **({} if scaler is None else {"scaler": scaler.state_dict()}),
        }
        weights = trained.weights(learner.transformer, self.job.config.model)
        if learner.trains_others:
            parts[TRAINED] = weights
        if average is not None:
            parts["progress"][AVERAGED] = average.updates
        copy = partial(parallel.host_copy, keep=keep)
        copied: dict[str, Any] = {"parts": checkpoint.snapshot(parts, copy)}
        with learner.as_used():
            copied["weights"] = checkpoint.snapshot(weights, copy)
        if average is not None:
            copied["average"] = checkpoint.snapshot(average.whole(), copy)
        return copied

    def write(self, folder: Staged, snapshot: dict[str, Any]) -> None:
        """Write a snapshot into a staged folder."""
        about = self.metadata(snapshot["parts"]["progress"]["step"])
        trained.save(folder, self.learner.transformer, snapshot["weights"], self.job.config, about)
        if "average" in snapshot:
            beside = Staged(folder / trained.AVERAGE)
            beside.mkdir()
            about["qif.ema_decay"] = str(self.job.config.train.ema.decay)
            trained.save(beside, self.learner.transformer, snapshot["average"], self.job.config, about)
        checkpoint.save_state(folder, snapshot["parts"])

    def metadata(self, step: int) -> dict[str, str]:
        """What the weights file of a step says about itself."""
        train, family = self.job.config.train, self.job.family
        sampling = family.defaults(pipeline_config(self.job.folder), self.learner.transformer.config)._asdict()
        return {
            **run_metadata(self.job.config, step, self.job.folder),
            "qif.family": family.name,
            "qif.sigma_distribution": train.sigma_distribution,
            "qif.sigma_shift": str(train.sigma_shift),
            "qif.guidance_scale": str(train.guidance_scale),
            "qif.sampling": json.dumps(sampling),
            **self.base_files,
        }

    @cached_property
    def base_files(self) -> dict[str, str]:
        """What a LoRA file says of the files under it, beside the checkpoint: names and SHA-256 sums."""
        model = self.job.config.model
        if model.lora is None:
            return {}
        about = (
            {}
            if model.transformer_path is None
            else {"qif.transformer_file": json.dumps(_named(model.transformer_path))}
        )
        merged = [{**_named(find_lora(one.file)), "strength": one.strength} for one in model.base_loras]
        return about | ({"qif.base_loras": json.dumps(merged)} if merged else {})

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder, which was verified when it was found, and compared by `check_resume`.

        Raises:
            CheckpointError: a file is not what was written there.
            ConfigError: the checkpoint is of another model or optimizer.
        """
        learner = self.learner
        try:
            trained.load(folder, learner.transformer, self.job.config.model)
        except SafetensorError as error:
            raise checkpoint.CheckpointError(f"{folder}: its weights cannot be read: {error}") from error
        if learner.trains_others:
            weights = trained.weights(learner.transformer, self.job.config.model)
            trained.restore(weights, checkpoint.load_state(folder, TRAINED))
        progress = checkpoint.load_state(folder, "progress")
        if learner.average is not None and AVERAGED in progress:
            learner.average.restore(trained.exact(folder / trained.AVERAGE), progress[AVERAGED])
        shared = parallel.is_sharded(learner.transformer)
        saved = checkpoint.load_state(folder, "optimizer", mapped=shared)
        if shared:
            saved["state"] = parallel.cut_state(saved["state"], learner.optimizer.optimizer)
        for note in restore_optimizer(learner.optimizer.optimizer, saved):
            self.job.say(f"note: {note}")
        schedule = learner.schedule
        schedule.load_state_dict(checkpoint.load_state(folder, "schedule"))
        # The optimizer came with the rate that the schedule of then had for the next step; this run's may be longer.
        groups = learner.optimizer.param_groups
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * factor(schedule.last_epoch)
        scaler = self.job.accelerator.scaler
        if scaler is not None and (folder / "scaler.json").is_file():  # not after another precision
            scaler.load_state_dict(checkpoint.load_state(folder, "scaler"))
        if learner.rounded is not None:
            learner.rounded.number = progress["step"]
        self.progress.step, self.progress.bad_steps = progress["step"], progress["bad_steps"]
