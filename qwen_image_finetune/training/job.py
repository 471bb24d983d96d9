"""A run as it is known before any model loads: who takes part, which pairs, in which order, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config, ConfigError, resolve_family
from qwen_image_finetune.data import left_out
from qwen_image_finetune.data.batches import Batches
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.told import shares_of
from qwen_image_finetune.disk import versions
from qwen_image_finetune.encoding.cache import EncodedDataset
from qwen_image_finetune.encoding.pairs import Pairs, encoded, open_pairs
from qwen_image_finetune.encoding.streaming import fill_by_shard
from qwen_image_finetune.families import get_family, with_targets
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting import choice
from qwen_image_finetune.fitting.plan import card_memory
from qwen_image_finetune.levers import attention, parallel
from qwen_image_finetune.levers.parallel import Sharding
from qwen_image_finetune.levers.stored_precision import base_precision, check_installed
from qwen_image_finetune.machine import console
from qwen_image_finetune.machine.accelerator import build_accelerator, build_team
from qwen_image_finetune.machine.processes import Team
from qwen_image_finetune.training.check import check_run, check_transformer, model_notes

if TYPE_CHECKING:
    from accelerate import Accelerator


class Due(NamedTuple):
    """What follows a step: a function of the configuration and the step, whenever the run is at it."""

    saves: bool
    draws: bool
    measures: bool

    @property
    def validates(self) -> bool:
        """Whether a round of validation follows."""
        return self.draws or self.measures


@dataclass(frozen=True)
class Job:
    """What all parts of a training run are built from."""

    config: Config  # nothing in it is left to decide
    family: Family
    folder: Path  # of the checkpoint
    accelerator: Accelerator
    team: Team
    sharding: Sharding | None  # None: every process has the whole model
    rows: EncodedDataset  # pairs to train on
    held_out: EncodedDataset | None  # pairs that are only validated on, as many as that takes
    asked: EncodedDataset | None  # prompts of validation.samples
    preserved: EncodedDataset | None  # pairs of loss.preservation.dataset_path
    pairs: Pairs  # all of them
    batches: Batches
    preserved_batches: Batches | None  # of the pairs of loss.preservation.dataset_path, as many a step as of the others
    total_steps: int  # optimizer steps of the whole run, resumed ones included

    @property
    def micro_batches_per_step(self) -> int:
        """Over all processes."""
        return self.config.train.gradient_accumulation_steps * self.team.size

    @property
    def blind(self) -> bool:
        """Whether some samples are trained without references."""
        dropped = self.config.data.init_args.drops_references
        trained = (self.pairs.training, self.pairs.preserved)
        return dropped or not all(row.reference_names for each in trained if each is not None for row in each.rows)

    def due(self, step: int) -> Due:
        """What follows when `step` steps are done."""
        train, validation = self.config.train, self.config.validation
        saves = step == self.total_steps or step % train.checkpointing_steps == 0
        draws = validation.enabled and step % validation.steps == 0
        measured = self.held_out is not None and validation.num_loss_pairs > 0
        return Due(saves, draws, measures=measured and (saves or draws))

    def say(self, message: str) -> None:
        """Tell the person, once and not in every process."""
        if self.team.main:
            console.say(message)


def open_job(config: Config) -> Job:
    """Read and check everything that a run needs beside its models.

    Raises:
        ConfigError, DataError, LaunchError: what the run would fail of later.
    """
    check_run(config, download=True)
    sharding = parallel.requested()  # before accelerate sees the request
    accelerator = build_accelerator(config)
    team = build_team(accelerator)
    parallel.check(sharding, config, team.size)
    family = get_family(resolve_family(config, download=True)[0])
    config = with_targets(config, family)
    check_sharing(config, team.size, shared=sharding is not None)

    fill_by_shard(config, family, accelerator, console.say if team.main else lambda message: None)
    version = team.share(lambda: resumed_version(config), "looking for a run to resume")
    before = () if version is None else left_out.read(Path(version))
    pairs = open_pairs(config, family, before=before, share=team.share)
    if sharding is not None and family.references_apart:
        check_references(config, pairs)
    folder = loading.checkpoint_folder(config, family)
    place = folder / "transformer"
    for line in model_notes(config):
        console.note(line)
    precision = base_precision(place, config.model)  # a contradiction is refused before embeddings are computed
    check_installed(config.model, folder)
    check_transformer(config, family, folder)
    attention.choose(config.train.attention, accelerator.device, loading.weight_dtype(config.train.mixed_precision))
    parallel.check_base(sharding, config.model.transformer_path or place, precision)
    card = least(accelerator, card_memory() if accelerator.device.type == "cuda" else None)
    config = choice.kept(config, None if version is None else Path(version))
    config, expectation = choice.settled(
        config, family, folder, largest_sample(pairs.training, pairs.preserved), card, team.local_size
    )
    rows, held_out, own, preserved = encoded(
        config, family, pairs, folder, loading.encoder_dtype(config.train.mixed_precision)
    )
    batches = plan_batches(config, pairs.training, team.size)
    others = None if pairs.preserved is None else plan_batches(config, pairs.preserved, team.size, dropped=False)
    job = Job(
        config=config,
        family=family,
        folder=folder,
        accelerator=accelerator,
        team=team,
        sharding=sharding,
        rows=rows,
        held_out=held_out,
        asked=own,
        preserved=preserved,
        pairs=pairs,
        batches=batches,
        preserved_batches=others,
        total_steps=num_steps(config, batches),
    )
    if expectation is not None and sharding is None:
        job.say(expectation)
    return job


def least(accelerator: Accelerator, free: int | None) -> int | None:
    """The least of what all processes have free; None without cards.

    Each deciding for itself would swap other blocks than its neighbours, and DDP would send weights to wrong places.
    """
    if free is None:
        return None
    return int(accelerator.gather(torch.tensor([free], device=accelerator.device)).min())


def resumed_version(config: Config) -> str | None:
    """Folder of the version that a run goes on from, where that is needed; None of one that starts afresh."""
    spec = config.train.resume_from_checkpoint
    needed = choice.asks(config) or config.data.max_bad_share > 0
    found = spec and versions.find_checkpoint(config.logging.project_dir, spec, lambda message: None)
    return str(Path(found).resolve().parent) if found and needed else None


def largest_sample(*datasets: ImageDataset | None) -> list[tuple[int, int]]:
    """Sizes (width, height) of target and references of the sample with the most pixels."""
    samples = {each.geometry(index) for each in datasets if each is not None for index in range(len(each))}
    return list(max(samples, key=lambda sizes: sum(width * height for width, height in sizes)))


def check_references(config: Config, pairs: Pairs) -> None:
    """Raise ConfigError where processes that share a model would not all run the blocks of references in one step.

    Those that do would wait for the others for ever.
    """
    datasets = [dataset for dataset in pairs if dataset is not None]
    seen = {bool(row.reference_names) for dataset in datasets for row in dataset.rows}
    dropped = config.data.init_args.drops_references and True in seen
    if dropped or len(seen) > 1:
        cause = "some pairs have references, others none"
        if dropped:
            cause = "prompt_image_dropout_rate drops the references of some samples"
        raise ConfigError(
            f"{cause}, with FSDP: this model has blocks for references alone, which all processes must run together. "
            "Let every sample have references, or none, or do not share the model (configs/accelerate/ddp.yaml)"
        )


def check_sharing(config: Config, processes: int, shared: bool) -> None:
    """Raise ConfigError for levers that several processes, or a model that they share, exclude."""
    train = config.train
    if shared and choice.asks(config):
        raise ConfigError(
            "model.quantize=auto or train.compile=auto with FSDP: nothing is chosen for a card there; set "
            "model.quantize=false, and train.compile to true or false"
        )
    if train.release_gradients and processes > 1:
        raise ConfigError(
            f"train.release_gradients=true with {processes} processes: gradients are used before they are averaged; "
            "train in one process, or share the model (configs/accelerate/fsdp2.yaml) without releasing gradients"
        )
    on = {
        "blocks_to_swap": train.blocks_to_swap != 0,
        "memory": train.memory == "auto",
        "low_memory": train.low_memory,
        "keep_activations": train.keep_activations == "auto",
    }
    deciding = [f"train.{name}" for name, is_on in on.items() if is_on]
    if shared and deciding:
        raise ConfigError(
            f"{deciding[0]} with FSDP: the weights of blocks are already shared by all, and nothing is chosen "
            "for a card; set train.blocks_to_swap=0, train.memory=as_written, train.low_memory=false, and "
            "train.keep_activations to a number or none"
        )


def num_steps(config: Config, batches: Batches) -> int:
    """Optimizer steps of the whole run: whichever of train.max_train_steps and train.num_epochs ends first."""
    limits = [config.max_steps, batches.steps(config.train.num_epochs) if config.train.num_epochs else None]
    return min(limit for limit in limits if limit is not None)


def plan_batches(config: Config, dataset: ImageDataset, processes: int, dropped: bool = True) -> Batches:
    """The order of the samples over all processes.

    Args:
        dropped: some lose their prompt or their references, as their data sets say.
    """
    shared = [row.shared for row in dataset.rows]
    return Batches(
        [
            tuple(dataset.geometry(index, visit) for visit in range(turns)) if turns > 1 else (dataset.geometry(index),)
            for index, turns in enumerate(map(dataset.turns, range(len(dataset))))
        ],
        batch_size=config.data.batch_size,
        micro_batches_per_step=config.train.gradient_accumulation_steps * processes,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        caption_dropout_rate=[each.caption_dropout * dropped for each in shared],
        reference_dropout_rate=[each.reference_dropout * dropped for each in shared],
        shares=shares_of(dataset.rows),
    )
