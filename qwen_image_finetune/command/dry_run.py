"""What a run would load, train and write, without a network, a GPU or the models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwen_image_finetune.command.saying import loading, tell
from qwen_image_finetune.config import Config, resolve_family
from qwen_image_finetune.disk.runs import next_version
from qwen_image_finetune.levers.stored_precision import base_precision, local_checkpoint


def show(config: Config) -> None:
    """Print the resolved configuration and the plan of the run, each line as soon as it is known.

    Raises:
        ConfigError: the checkpoint contradicts the configuration, or this machine lacks what the run needs.
    """
    from qwen_image_finetune.training.check import check_run, model_notes

    if local_checkpoint(config.model) is not None:
        loading()  # its memory is predicted, and its modules are compared with the adapter
    for line in lines(config):
        print(line, flush=True)
    tell(model_notes(config))
    check_run(config)


def lines(config: Config) -> Iterator[str]:
    """The resolved configuration and the plan of the run; raises ConfigError where the checkpoint contradicts it."""
    yield from ("# resolved configuration", config.to_yaml().rstrip(), "", "# plan")
    yield from _plan(config)


def _plan(config: Config) -> Iterator[str]:
    family, source = resolve_family(config)
    model, train, data = config.model, config.train, config.data
    yield f"model:    {family} ({source}), from {model.pretrained_model_name_or_path}"
    checkpoint = local_checkpoint(model)
    if model.transformer_file is not None:
        yield f"          its transformer from {model.transformer_file}"
    yield from _base(config, checkpoint)
    for lora in model.base_loras:
        yield f"          {lora.file} merged into it at strength {lora.strength:g}"
    if model.lora is None:
        yield "trains:   every weight of the transformer"
    else:
        targets = model.lora.target_modules or "the model's own targets"
        yield f"trains:   {model.lora.words}, on {targets}"
    folders = ", ".join(entry.path for entry in data.init_args.entries)
    yield f"data:     {folders}, batches of {data.batch_size}, {train.gradient_accumulation_steps} per step and process"
    ends = [f"{config.max_steps} optimizer steps"] if config.max_steps else []
    ends += [f"{train.num_epochs} epochs"] if train.num_epochs else []
    yield f"length:   {', or '.join(ends)}, whichever ends first" if len(ends) > 1 else f"length:   {ends[0]}"
    yield f"learning: {config.optimizer.class_path} {config.optimizer.init_args}, {config.lr_scheduler.scheduler_type}"
    yield from _memory(config, checkpoint)
    where = f"the cache in {config.cache.cache_dir}" if config.cache.use_cache else "encoders that stay loaded"
    yield f"encodes:  from {where}"
    version = next_version(config.logging.project_dir)
    yield f"writes:   {version}, a checkpoint every {train.checkpointing_steps} steps"
    if train.resume_from_checkpoint:
        yield f"resumes:  {train.resume_from_checkpoint}"


def _base(config: Config, checkpoint: Path | None) -> Iterator[str]:
    """Precision of the frozen weights, and the layers that fit it worst, where the checkpoint lies on this machine."""
    model = config.model
    asked = model.asked_format
    if checkpoint is None:
        known = f"frozen base quantised to {asked}" if asked else "the precision of the base is known when it is here"
        yield f"          not on this machine; {known}"
        return
    folder = checkpoint / "transformer"
    precision = base_precision(folder, model)
    if precision.stored:
        yield f"          frozen base in {precision.format}, as the checkpoint is ({precision.source})"
    elif precision.format:
        from qwen_image_finetune.families import get_family
        from qwen_image_finetune.levers.quantize import BOUNDS, SAMPLED_ROWS, quantization_errors
        from qwen_image_finetune.loading import transformer_file

        bound = BOUNDS[precision.format]
        file = transformer_file(get_family(resolve_family(config)[0]), model)
        errors = quantization_errors(folder, precision.format, SAMPLED_ROWS, file)
        yield f"          frozen base quantised to {precision.format}; errors of {len(errors)} layers, from a sample:"
        for name, error in errors[:5]:
            yield f"          {error:7.2%}  {name}"
        above = sum(not error <= bound for _, error in errors)
        yield f"          {above} above {bound:.0%}, to be left in full precision"


def _memory(config: Config, checkpoint: Path | None) -> Iterator[str]:
    """Predicted peaks, where the checkpoint lies on this machine; else nothing heavy is loaded for a guess at it."""
    if checkpoint is None:
        yield "memory:   `qif plan` predicts it from the architecture"
        return
    from qwen_image_finetune.fitting.plan_words import summary

    for number, line in enumerate(summary(config)):
        yield f"{'memory:   ' if number == 0 else ' ' * 10}{line}"
