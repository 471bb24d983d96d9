"""What a run would load, train and write, without a network, a GPU or the models."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen_image_finetune.config import Config, resolve_family


def describe(config: Config) -> str:
    """The resolved configuration and the plan of the run, as text.

    Raises:
        ConfigError: the checkpoint contradicts the configuration.
    """
    return "\n".join(["# resolved configuration", config.to_yaml().rstrip(), "", "# plan", *_plan(config)])


def _plan(config: Config) -> Iterator[str]:
    family, source = resolve_family(config)
    model, train, data = config.model, config.train, config.data
    yield f"model:    {family} ({source}), from {model.pretrained_model_name_or_path}"
    if model.quantize:
        yield f"          frozen base quantised to {'fp8' if model.quantize is True else model.quantize}"
    if model.lora is None:
        yield "trains:   every weight of the transformer"
    else:
        targets = model.lora.target_modules
        yield f"trains:   a LoRA of rank {model.lora.r}, alpha {model.lora.lora_alpha:g}, on {targets}"
    folders = ", ".join(str(folder) for folder in data.init_args.folders)
    yield f"data:     {folders}, batches of {data.batch_size}, {train.gradient_accumulation_steps} per step and process"
    ends = [f"{config.max_steps} optimizer steps"] if config.max_steps else []
    ends += [f"{train.num_epochs} epochs"] if train.num_epochs else []
    yield f"length:   {', or '.join(ends)}, whichever ends first" if len(ends) > 1 else f"length:   {ends[0]}"
    yield f"learning: {config.optimizer.class_path} {config.optimizer.init_args}, {config.lr_scheduler.scheduler_type}"
    where = f"the cache in {config.cache.cache_dir}" if config.cache.use_cache else "encoders that stay loaded"
    yield f"encodes:  from {where}"
    project = config.logging.project_dir
    yield f"writes:   {project}/{_next_version(config)}, a checkpoint every {train.checkpointing_steps} steps"
    if train.resume_from_checkpoint:
        yield f"resumes:  {train.resume_from_checkpoint}"


def _next_version(config: Config) -> str:
    project = config.logging.project_dir
    names = [path.name for path in project.iterdir()] if project.is_dir() else []
    numbers = [int(name[1:]) for name in names if re.fullmatch(r"v\d+", name)]
    return f"v{max(numbers, default=-1) + 1}"
