"""The training loop, and what is set up around it."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from qwen_image_finetune import cache, checkpoint, console, flow, levers, loading, out_of_memory, processes, runs
from qwen_image_finetune.cache import EncodedDataset, TextVariant
from qwen_image_finetune.config import Config, ConfigError, resolve_family
from qwen_image_finetune.data.batches import Batches, MicroBatch
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.environment import environment
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.files import DiskFull, is_disk_full, write_atomic
from qwen_image_finetune.held_out import HeldOutLoss, open_pairs, training_config
from qwen_image_finetune.levers import lora_files, parallel, trained
from qwen_image_finetune.levers.attention import attention_of
from qwen_image_finetune.levers.compile import compilation_of
from qwen_image_finetune.levers.release import GradientRelease
from qwen_image_finetune.levers.stored_precision import base_precision
from qwen_image_finetune.optim import build_optimizer, build_scheduler, optimizer_state, restore_optimizer
from qwen_image_finetune.plan import settled
from qwen_image_finetune.preparation import (
    Say,
    build_accelerator,
    build_team,
    check_run,
    plan_batches,
    prepare_embeddings,
    prepare_held_out,
)
from qwen_image_finetune.processes import Team
from qwen_image_finetune.records import Batch, Encoded, Example, collate
from qwen_image_finetune.signals import INTERRUPTED, TERMINATED, StopSignals
from qwen_image_finetune.trackers import Trackers
from qwen_image_finetune.validate import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline, ModelMixin

BAD_STEPS_IN_A_ROW = 3


NOT_FINITE = (
    "the loss or the gradients were not finite for three steps in a row; the weights of step {} are saved. Lower "
    "optimizer.init_args.lr, use train.mixed_precision=bf16, and look at the samples named above"
)


RELEASED_NOT_FINITE = (
    "the loss or the gradients of step {} were not finite, and train.release_gradients has used them already: continue "
    "from the last checkpoint, with a lower optimizer.init_args.lr or without train.release_gradients"
)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


@dataclass
class Progress:
    """Where a run is. Order of the data and noise are functions of it, so a resume needs nothing else of them."""

    step: int = 0  # optimizer steps done
    bad_steps: int = 0  # steps in a row that were skipped because of a non-finite loss or gradient


def train(config: Config) -> Path | None:
    """Train as configured; returns the version folder (in the first process; None in the others).

    Raises:
        ConfigError, DataError, RunError: before any model is loaded.
        TrainingStopped: the loss or the gradients stay non-finite.
        DiskFull, OutOfMemory: the last checkpoint is intact.
        SystemExit: 143 after SIGTERM or SIGUSR1, 130 after SIGINT; if steps were done, in a checkpoint.
    """
    with StopSignals() as stopping:
        return _train(config, stopping)


def _train(config: Config, stopping: StopSignals) -> Path | None:
    # Who takes part
    accelerator = build_accelerator(config)
    team = build_team(accelerator)
    sharding = parallel.requested()
    main = team.main
    say: Say = console.say if main else lambda message: None
    family = get_family(resolve_family(config, download=True)[0])
    check_run(config, family)
    check_sharing(config, team.size, shared=sharding is not None)

    # The pairs, and how long the run is
    pairs = open_pairs(config, family)
    dataset = pairs.training
    folder = loading.checkpoint_folder(config, family)
    base_precision(folder / "transformer", config.model)  # a contradiction is refused before embeddings are computed
    config, expectation = settled(config, family, largest_sample(dataset), accelerator.device)
    if expectation is not None and sharding is None:
        say(expectation)
    encoder_dtype = loading.encoder_dtype(config.train.mixed_precision)
    rows = EncodedDataset(training_config(config, pairs), family, dataset, folder, encoder_dtype)
    held_out = None
    if pairs.held_out is not None:
        held_out = EncodedDataset(config, family, pairs.held_out, folder, encoder_dtype)
    batches = plan_batches(config, dataset, accelerator.num_processes)
    total_steps = num_steps(config, batches)

    # Where the run is written, and where it continues
    found = team.share(lambda: find_resume(config, say), "looking for a checkpoint")  # one looks: all see the same
    resume = None if found is None else Path(found)
    run = open_run(config, resume) if main else None
    progress = Progress()
    trackers = writer = None
    outcome: runs.State = "failed"
    doing = "encoding the data set" if config.cache.use_cache else "loading the encoders"
    try:
        # Embeddings: from the cache, which is completed first, or from encoders that stay
        pipe = prepare_embeddings(config, rows, accelerator, say)
        if held_out is not None:
            prepare_held_out(config, held_out, accelerator, say)

        # The model, its optimizer, and their state
        doing = "loading the transformer"
        dtype = loading.weight_dtype(config.train.mixed_precision)
        if sharding is None:
            # Swapped blocks must not pass through the card: it has no room for all of them.
            home = accelerator.device if config.train.blocks_to_swap == 0 else torch.device("cpu")
            transformer = loading.load_transformer(family, folder, dtype, config.model, home, say)
        else:
            transformer = loading.empty_transformer(family, folder, dtype)  # filled once it is cut
        levers.prepare(transformer, config, accelerator.device)
        say(f"attention: {attention_of(transformer)}")
        if config.model.lora and config.model.lora.pretrained_weight and resume is None:
            lora_files.load_lora(transformer, config.model.lora.pretrained_weight, family.pipeline, config.model.lora)
        if sharding is None and config.train.blocks_to_swap == 0:
            transformer.to(accelerator.device)
        elif sharding is not None:
            parallel.shard(transformer, sharding, accelerator.device)
            parallel.fill(transformer, folder / "transformer", dtype, accelerator.device)
        transformer.train()
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(config.optimizer, parameters)
        schedule = build_scheduler(config.lr_scheduler, optimizer, total_steps)
        team.meet("loading the transformer")
        optimizer = accelerator.prepare(optimizer)
        # The wrapper is there for fp16's gradient scaler; it searches for an optional package at every call.
        stepped = optimizer.optimizer if accelerator.scaler is None else optimizer
        model = accelerator.prepare_model(transformer, device_placement=False) if sharding is None else transformer
        state = State(config, family, transformer, optimizer, schedule, progress, accelerator)
        if resume is not None:
            state.load(resume)
            say(f"continuing {resume} at step {progress.step}")
        released = GradientRelease(optimizer.optimizer, parameters) if config.train.release_gradients else None
        say(f"{family.name}, {sum(p.numel() for p in parameters):,} trained weights, {len(dataset)} pairs, "
            f"{total_steps} steps" + (f" -> {run.path}" if run else ""))  # fmt: skip

        # What the loop reports to
        if run is not None:
            run.rewind(progress.step)
            write_atomic(run.path / "config.yaml", config.to_yaml())
            made_with = environment(device_words(accelerator.device), accelerator.num_processes)
            write_atomic(run.path / runs.ENVIRONMENT, json.dumps(made_with) + "\n")
            trackers = Trackers(config, run.path, progress.step or None)
        guidance = config.train.guidance_scale if family.distilled_guidance(transformer.config) else None
        velocity = partial(family.velocity, model, guidance=guidance)
        objective = Objective(config, family, velocity, loading.load_scheduler(folder).config, accelerator)
        writer = checkpoint.CheckpointWriter()
        save = partial(save_checkpoint, config, run, writer, state, batches, team)
        validation = None
        if config.validation.enabled and (main or sharding):  # a model that is shared runs in all processes at once
            shown = rows if held_out is None else held_out
            plain = Objective(config, family, partial(family.velocity, transformer, guidance=guidance),
                              objective.scheduler_config, accelerator)  # fmt: skip
            measure = HeldOutLoss(plain, config.validation) if held_out is not None else None
            validation = Validation(config, shown, pipe, transformer, accelerator.device, run, trackers, measure)
            validation.start(progress.step)
        team.meet("preparing to train")

        # The loop
        stream = read_ahead(config, rows, pipe, batches, accelerator, progress.step, total_steps)
        stopping.defer()
        doing = "training"
        first_step = progress.step
        compilation, compiled = (compilation_of(transformer) if config.train.compile else None), 0
        with (
            console.progress("training", total_steps, progress.step, shown=main) as update,
            team.watched(config.train.collective_timeout),
        ):
            while progress.step < total_steps:
                began = time.monotonic()
                samples = sum(len(micro.rows) for micro in batches.at(progress.step))
                total_loss, sigmas = torch.zeros((), device=accelerator.device), []
                for place in range(config.train.gradient_accumulation_steps):
                    team.enter(f"reading the samples of step {progress.step + 1}")
                    micro, batch = next(stream)
                    team.enter(f"computing step {progress.step + 1}")
                    is_last = place == config.train.gradient_accumulation_steps - 1
                    with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                        loss, sigma = objective(batch, micro)
                        # The step's loss is the mean over all its samples; gradients are averaged over processes.
                        accelerator.backward(loss.sum() * accelerator.num_processes / samples)
                    total_loss += loss.detach().sum() / samples
                    sigmas.append(sigma)

                if released is not None:
                    norm = released.take_norm()
                else:
                    norm = accelerator.clip_grad_norm_(parameters, config.train.max_grad_norm or math.inf)
                gradient_norm = float(parallel.gathered(norm, keep=True))
                mean_loss, stop = agree(accelerator, total_loss, stopping.received)
                # fp16 gradients overflow now and then by design; the gradient scaler skips those steps itself.
                overflow = accelerator.scaler is not None and not math.isfinite(gradient_norm)
                sound = math.isfinite(mean_loss) and (math.isfinite(gradient_norm) or overflow)
                learning_rate = optimizer.param_groups[0]["lr"]
                if not sound and released is not None:
                    raise TrainingStopped(RELEASED_NOT_FINITE.format(progress.step + 1))
                if sound:
                    stepped.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                progress.step += 1
                progress.bad_steps = 0 if sound else progress.bad_steps + 1
                writer.raise_if_failed()
                if compilation is not None and compilation.num_graphs > compiled:
                    compiled = compilation.num_graphs
                    say(f"step {progress.step}: {compilation.words()}")
                if progress.step == first_step + 1:  # kernels are built, connections made: now nobody should be late
                    processes.set_timeout(timedelta(seconds=config.train.collective_timeout))

                if run is not None and trackers is not None:
                    values = {
                        "loss": mean_loss,
                        "grad_norm": gradient_norm,
                        "learning_rate": learning_rate,
                        "epoch": batches.epoch_of(progress.step - 1),
                        "step_seconds": time.monotonic() - began,
                        "memory_gib": memory_gib(accelerator.device),
                    }
                    run.record(progress.step, values)
                    trackers.scalars(values, progress.step)
                    trackers.collect("sigma", sigmas, progress.step)
                    update(progress.step, f"loss {mean_loss:.4f}, {values['memory_gib']:.1f} GiB")
                if not sound:
                    say(f"step {progress.step}: loss {mean_loss}, gradient norm {gradient_norm}: not learnt from; "
                        f"its samples were {', '.join(sample_keys(dataset, batches, progress.step - 1))}")  # fmt: skip
                    if progress.bad_steps == BAD_STEPS_IN_A_ROW:
                        progress.bad_steps = 0  # of a run that goes on from here
                        save(wait=True)
                        raise TrainingStopped(NOT_FINITE.format(progress.step - BAD_STEPS_IN_A_ROW))
                if stop:
                    save(wait=True)
                    outcome = "interrupted"
                    say(f"stopped by {signal.Signals(stop).name} after step {progress.step}, which is saved; "
                        "continue with train.resume_from_checkpoint=latest")  # fmt: skip
                    raise SystemExit(INTERRUPTED if stop == signal.SIGINT else TERMINATED)
                saved = progress.step % config.train.checkpointing_steps == 0 or progress.step == total_steps
                if saved:
                    save(wait=progress.step == total_steps)
                draws = config.validation.enabled and progress.step % config.validation.steps == 0
                if draws or (saved and held_out is not None):
                    doing = "drawing samples"
                    if validation is not None:  # processes that draw together are not cancelled one by one
                        at = run.checkpoint_path(batches.epoch_of(progress.step - 1), progress.step) if run else None
                        validation(progress.step, lambda: stopping.received != 0 and sharding is None,
                                   draws, at if saved else None)  # fmt: skip
                    team.meet(doing)
                    doing = "training"
        writer.wait()
        outcome = "finished"
        if run is not None:
            say(f"done: {run.path}")
        return run.path if run else None
    except SystemExit:
        outcome = "interrupted"
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        out_of_memory.raise_explained(error, config, doing)
        if isinstance(error, OSError) and is_disk_full(error) and not isinstance(error, DiskFull):
            raise DiskFull(Path(error.filename or config.logging.project_dir)) from error
        raise
    finally:
        # Each part ends whatever becomes of the others; what went wrong first is what the caller hears.
        with contextlib.ExitStack() as ending:
            if outcome == "failed":
                processes.abandon()
            if run is not None:
                ending.callback(run.close)
                ending.callback(finish, run, outcome, progress.step)
            if trackers is not None:
                ending.callback(trackers.close)
            if writer is not None:
                ending.callback(writer.settle)


def finish(run: runs.Run, outcome: runs.State, step: int) -> None:
    """Write how a run ended. On a full disk it reads as killed, which can be resumed just as well."""
    try:
        run.finish(outcome, step)
    except DiskFull as error:
        console.say(str(error))


# What is set up


def largest_sample(dataset: ImageDataset) -> list[tuple[int, int]]:
    """Sizes (width, height) of target and references of the sample with the most pixels."""
    samples = {dataset.geometry(index) for index in range(len(dataset))}
    return list(max(samples, key=lambda sizes: sum(width * height for width, height in sizes)))


def check_sharing(config: Config, processes: int, shared: bool) -> None:
    """Raise ConfigError for levers that several processes, or a model that they share, exclude."""
    train = config.train
    if train.release_gradients and processes > 1:
        raise ConfigError(
            f"train.release_gradients=true with {processes} processes: gradients are used before they are averaged; "
            "train in one process, or share the model (configs/accelerate/fsdp2.yaml) without releasing gradients"
        )
    swaps = train.blocks_to_swap != 0 or train.memory == "auto"
    if shared and swaps:
        key = "train.blocks_to_swap" if train.blocks_to_swap != 0 else "train.memory"
        raise ConfigError(
            f"{key} with FSDP: the weights of blocks are already shared by all processes; set train.blocks_to_swap=0 "
            "and train.memory=as_written"
        )


def num_steps(config: Config, batches: Batches) -> int:
    """Optimizer steps of the whole run: whichever of train.max_train_steps and train.num_epochs ends first."""
    limits = [config.max_steps, batches.steps(config.train.num_epochs) if config.train.num_epochs else None]
    return min(limit for limit in limits if limit is not None)


def find_resume(config: Config, say: Say) -> str | None:
    """Folder of the checkpoint to continue, verified; None for a fresh start."""
    spec = config.train.resume_from_checkpoint
    if spec is None:
        return None
    found = runs.find_checkpoint(config.logging.project_dir, spec, say)
    if found is None:
        say(f"no complete checkpoint in {config.logging.project_dir}: starting afresh")
        return None
    return str(found)


def open_run(config: Config, resume: Path | None) -> runs.Run:
    """A new version, or the one that the checkpoint came from."""
    project = config.logging.project_dir
    version = None if resume is None else runs.version_of(resume)
    if version is not None and version.resolve().parent == project.resolve():
        return runs.reopen_version(version)
    return runs.claim_version(project)


# What the loop calls


class Objective:
    """Loss of one micro-batch."""

    def __init__(
        self, config: Config, family: Family, velocity: Any, scheduler_config: Any, accelerator: Accelerator
    ) -> None:
        self.train, self.weighting = config.train, config.loss
        self.family, self.velocity, self.scheduler_config = family, velocity, scheduler_config
        self.accelerator = accelerator
        self.dtype = loading.weight_dtype(config.train.mixed_precision)
        self.dropout = bool(config.model.lora and config.model.lora.lora_dropout)

    def shift(self, latent_shape: Sequence[int]) -> float:
        """Timestep shift of a target latent: the model's own for its number of tokens, or the configured constant."""
        if self.train.sigma_shift != "model":
            return float(self.train.sigma_shift)
        mu = self.family.mu(self.family.tokens(latent_shape), self.scheduler_config)
        return flow.shift_factor(mu, self.scheduler_config)

    def weight(self, batch: Batch) -> Tensor | None:
        """Loss weights (B, H, W) of a batch with masks."""
        if not self.weighting.mask_loss or batch.mask is None:
            return None
        foreground, background = self.weighting.foreground_weight, self.weighting.background_weight
        return background + (foreground - background) * batch.mask

    def __call__(self, batch: Batch, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Loss (B,) float32 on the device, and the noise levels (B,) it was taken at, on the CPU."""
        shape = batch.target.shape[1:]
        visits = [micro.visit] * len(batch.keys)
        sigma, noise = flow.draw(
            batch.keys, visits, self.train.seed, shape, self.train.sigma_distribution, self.shift(shape)
        )
        if self.dropout:  # the only user of the global random state: make it a function of the samples as well
            torch.manual_seed(flow.seed_of("dropout", self.train.seed, *batch.keys, micro.visit))
        device = self.accelerator.device
        batch = batch.to(device, self.dtype)
        with self.accelerator.autocast():
            loss = flow.loss(
                partial(self.velocity, batch=batch),
                batch.target,
                sigma.to(device),
                noise.to(device),
                self.weight(batch),
            )
        return loss, sigma


@dataclass
class State:
    """Everything a resume needs, as named parts."""

    config: Config
    family: Family
    transformer: ModelMixin  # without the wrappers of several processes
    optimizer: Any
    schedule: Any
    progress: Progress
    accelerator: Accelerator

    def snapshot(self, keep: bool = True) -> dict[str, Any]:
        """Copies on the CPU of what changes from step to step; the loop may go on while they are written.

        Args:
            keep: False where another process writes: this one only gives its part of a model that is shared.
        """
        parts = {
            "optimizer": parallel.gathered(optimizer_state(self.optimizer.optimizer), keep),
            "schedule": self.schedule.state_dict(),
            "progress": {
                "step": self.progress.step,
                "bad_steps": self.progress.bad_steps,
                "seed": self.config.train.seed,
                "micro_batches_per_step": self.micro_batches_per_step,
            },
        }
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler.state_dict()
        return {
            "parts": checkpoint.snapshot(parts),
            "weights": trained.snapshot(self.transformer, self.config.model, keep),
        }

    @property
    def micro_batches_per_step(self) -> int:
        return self.config.train.gradient_accumulation_steps * self.accelerator.num_processes

    def write(self, folder: Path, snapshot: dict[str, Any]) -> None:
        """Write a snapshot into a staged folder."""
        trained.save(folder, self.transformer, snapshot["weights"], self.config.model, self.metadata(snapshot))
        checkpoint.save_state(folder, snapshot["parts"])

    def metadata(self, snapshot: dict[str, Any]) -> dict[str, str]:
        """What the weights file says about itself."""
        train, arguments = self.config.train, self.config.data.init_args
        steps, resolution = (
            str(snapshot["parts"]["progress"]["step"]),
            json.dumps(arguments.image_size or arguments.resolution),
        )
        return {
            "ss_base_model_version": self.config.model.pretrained_model_name_or_path,
            "ss_steps": steps,
            "ss_resolution": resolution,
            "ss_seed": str(train.seed),
            "ss_optimizer": self.config.optimizer.class_path,
            "modelspec.resolution": resolution,
            "modelspec.title": f"{self.config.logging.tracker_project_name} at step {steps}",
            "qif.family": self.family.name,
            "qif.sigma_distribution": train.sigma_distribution,
            "qif.sigma_shift": str(train.sigma_shift),
            "qif.guidance_scale": str(train.guidance_scale),
            "qif.sampling": json.dumps(
                {"num_inference_steps": self.family.num_inference_steps, "guidance_scale": self.family.guidance_scale}
            ),
        }

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint folder, which was verified when it was found."""
        try:
            trained.load(folder, self.transformer, self.config.model)
        except SafetensorError as error:
            raise checkpoint.CheckpointError(f"{folder}: its weights cannot be read: {error}") from error
        progress = checkpoint.load_state(folder, "progress")
        if progress["seed"] != self.config.train.seed:
            raise ConfigError(
                f"train.seed={self.config.train.seed}, but {folder} was trained with {progress['seed']}: order of the "
                "data and noise would change in the middle of the run; set the seed back or start afresh"
            )
        saved_per_step, processes_now = progress["micro_batches_per_step"], self.accelerator.num_processes
        if saved_per_step != self.micro_batches_per_step:
            raise ConfigError(
                f"{folder} was trained with {saved_per_step} batches a step (accumulation times processes); "
                f"train.gradient_accumulation_steps={self.config.train.gradient_accumulation_steps} with "
                f"{processes_now} processes makes {self.micro_batches_per_step}: order of the data and length of the "
                f"run would change; set it so that the product is {saved_per_step}"
            )
        saved = checkpoint.load_state(folder, "optimizer")
        saved["state"] = parallel.cut_state(saved["state"], self.optimizer.optimizer)
        for note in restore_optimizer(self.optimizer.optimizer, saved):
            if self.accelerator.is_main_process:
                console.say(f"note: {note}")
        self.schedule.load_state_dict(checkpoint.load_state(folder, "schedule"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.load_state(folder, "scaler"))
        self.progress.step, self.progress.bad_steps = progress["step"], progress["bad_steps"]


def save_checkpoint(
    config: Config,
    run: runs.Run | None,
    writer: checkpoint.CheckpointWriter,
    state: State,
    batches: Batches,
    team: Team,
    wait: bool = False,
) -> None:
    """Copy the state to the host and write it behind the loop's back; `wait` for the last one of a run."""
    step = state.progress.step
    if run is None:
        if parallel.is_sharded(state.transformer):
            state.snapshot(keep=False)
    else:
        final = run.checkpoint_path(batches.epoch_of(max(step - 1, 0)), step)
        snapshot = state.snapshot()
        writer.submit(
            final,
            lambda folder: state.write(folder, snapshot),
            lambda: runs.retention(run, config.train.checkpoints_total_limit),
            needed=checkpoint.num_bytes(snapshot),
        )
        if wait:
            writer.wait()
    team.meet("saving a checkpoint")


def read_ahead(
    config: Config,
    rows: EncodedDataset,
    pipe: DiffusionPipeline | None,
    batches: Batches,
    accelerator: Accelerator,
    first_step: int,
    last_step: int,
) -> Iterator[tuple[MicroBatch, Batch]]:
    """This process's micro-batches from `first_step` on, read before they are needed."""
    source = MicroBatches(rows, batches, config.train.gradient_accumulation_steps, accelerator, cached=pipe is None)
    span = range(
        first_step * config.train.gradient_accumulation_steps, last_step * config.train.gradient_accumulation_steps
    )
    for micro, items in source.stream(span, config):
        if pipe is None:
            yield micro, collate(items)
        else:
            variants = row_variants(micro)
            encoded = [rows.encode(pipe, example, variant) for example, variant in zip(items, variants, strict=True)]
            yield micro, collate(encoded)


class MicroBatches(torch.utils.data.Dataset[tuple[MicroBatch, list[Any]]]):
    """Micro-batches of one process by their number since the start of training."""

    def __init__(
        self, rows: EncodedDataset, batches: Batches, accumulation: int, accelerator: Accelerator, cached: bool
    ) -> None:
        self.rows, self.batches, self.accumulation, self.cached = rows, batches, accumulation, cached
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes

    def __getitem__(self, number: int) -> tuple[MicroBatch, list[Encoded] | list[Example]]:
        step, place = divmod(number, self.accumulation)
        micro = self.batches.at(step)[place * self.processes + self.rank]
        if self.cached:
            return micro, [
                self.rows.read(row, variant) for row, variant in zip(micro.rows, row_variants(micro), strict=True)
            ]
        return micro, [self.rows.dataset.load(row, micro.visit) for row in micro.rows]

    def stream(self, span: range, config: Config) -> Iterator[tuple[MicroBatch, Any]]:
        """The numbered micro-batches in order, read by worker processes, or by a thread where there are none."""
        if config.data.num_workers == 0:
            yield from (loaded for _, loaded in cache.ahead(span, self.__getitem__, config.data.prefetch_factor))
            return
        yield from torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=span,
            num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch_factor,
            persistent_workers=config.data.persistent_workers,
        )


def row_variants(micro: MicroBatch) -> list[TextVariant]:
    """How each row of a micro-batch is described to the model."""
    return [TextVariant("" if dropped else None, not micro.drop_references) for dropped in micro.drop_caption]


def sample_keys(dataset: ImageDataset, batches: Batches, step: int) -> list[str]:
    """Keys of the rows that a step (0-based) trained on, in all processes."""
    return [dataset.rows[row].key for micro in batches.at(step) for row in micro.rows]


def agree(accelerator: Accelerator, loss: Tensor, signal_number: int) -> tuple[float, int]:
    """Mean loss over all processes, and the signal that any of them received (0 for none)."""
    if accelerator.num_processes == 1:
        return float(loss), signal_number
    shared = torch.stack([loss.float(), torch.tensor(float(signal_number), device=loss.device)])
    gathered = accelerator.gather(shared[None])
    return float(gathered[:, 0].sum()), int(gathered[:, 1].max())


def memory_gib(device: torch.device) -> float:
    """Peak memory of the accelerator, or of the process on a CPU, in GiB."""
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.accelerator.max_memory_allocated(device) / 2**30


def device_words(device: torch.device) -> str:
    """The device as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
