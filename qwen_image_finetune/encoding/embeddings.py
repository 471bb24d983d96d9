"""Embeddings where training needs them: a complete cache, or encoders that stay in memory."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config, ConfigError, resolve_family
from qwen_image_finetune.encoding import cache
from qwen_image_finetune.encoding.cache import EncodedDataset
from qwen_image_finetune.encoding.limits import check_rows
from qwen_image_finetune.encoding.pairs import encoded, open_pairs
from qwen_image_finetune.encoding.store import Fingerprints
from qwen_image_finetune.encoding.streaming import fill_by_shard
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting import out_of_memory
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.levers.stored_precision import check_installed
from qwen_image_finetune.machine import console
from qwen_image_finetune.machine.accelerator import build_accelerator, build_team, encoder_homes
from qwen_image_finetune.machine.launch import LaunchError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

Say = Callable[[str], None]


def fill_cache(config: Config, rows: EncodedDataset, accelerator: Accelerator, say: Say) -> None:
    """Complete the cache; every process encodes its share, and only the end is waited for.

    Raises:
        DataError: pictures that cannot be read to their end, all of them, before any encoder loads.
        LaunchError: an entry that another process wrote does not appear here.
    """
    team = build_team(accelerator)
    homes = encoder_homes(config.cache, "cache", accelerator.device, team)
    with rows.store.filling():
        if not team.main:  # hashing the files is the first process's work; the others read what it found
            team.meet("naming the entries of the cache")
            rows.fingerprints = Fingerprints(rows.store.folder)
        missing = rows.missing(True, team.rank, team.size)
        if team.main:
            team.meet("naming the entries of the cache")
        share = missing.share(team.rank, team.size)
        if missing.damaged:
            say(f"{missing.damaged} damaged cache entries are encoded again")
        if missing:
            say(f"the cache in {rows.store.folder} lacks {len(missing.texts)} texts and {len(missing.images)} pictures "
                f"of {missing.entries} entries: encoding them")  # fmt: skip
            check_rows(rows, rows.rows_lacking(share))
            cache.fill(rows, share, homes, shown=team.main)
        else:
            say(f"the cache in {rows.store.folder} is complete: {missing.entries} entries")
    team.meet("encoding the data set")
    if team.size > 1:
        check_shared(rows, [*missing.images, *missing.texts])


def check_shared(rows: EncodedDataset, keys: Sequence[str]) -> None:
    """Refuse a cache folder that is not the same one for all processes. Network file systems may show files late.

    Raises:
        LaunchError: an entry that another process wrote did not appear here within a minute.
    """
    for _ in range(60):
        lacking = rows.store.missing(keys)
        if not lacking:
            return
        time.sleep(1)
    raise LaunchError(
        f"{len(lacking)} entries of the cache, written by other processes, are not in {rows.store.folder} on "
        f"{socket.gethostname()}: cache.cache_dir must name one folder that all machines see"
    )


def prepare_embeddings(
    config: Config, rows: EncodedDataset, accelerator: Accelerator, say: Say
) -> DiffusionPipeline | None:
    """Complete the cache, or, without one, load the encoders that training needs; None with the cache."""
    if config.cache.use_cache:
        fill_cache(config, rows, accelerator, say)
        return None
    team = build_team(accelerator)
    if team.main:
        check_rows(rows, range(len(rows.dataset)))
    team.meet("checking the pictures")
    train = config.train
    home = torch.device("cpu") if train.low_memory else accelerator.device  # low memory: the card is the transformer's
    homes = encoder_homes(train, "train", home, team)
    return loading.load_encoders(
        rows.family, rows.checkpoint, loading.encoder_dtype(train.mixed_precision), homes,
        text_format=rows.text_format, say=say,
    )  # fmt: skip


def prepare_held_out(config: Config, rows: EncodedDataset, accelerator: Accelerator, say: Say) -> None:
    """The same for pairs that are only validated on; without the cache the encoders are there already."""
    if config.cache.use_cache:
        fill_cache(config, rows, accelerator, say)
    elif accelerator.is_main_process:
        check_rows(rows, range(len(rows.dataset)))


def encode_dataset(config: Config) -> None:
    """Complete the cache of a configuration, whether or not it trains from it (`--cache`)."""
    sharding = parallel.requested()  # before accelerate sees the request
    accelerator = build_accelerator(config)
    parallel.check(sharding, config, accelerator.num_processes)
    say: Say = console.say if accelerator.is_main_process else lambda message: None
    family = get_family(resolve_family(config, download=True)[0])
    check_drop_keys(config, family)
    with out_of_memory.explained(config, "encoding the data set"):
        fill_by_shard(config, family, accelerator, say)
    pairs = open_pairs(config, family, share=build_team(accelerator).share)
    folder = loading.checkpoint_folder(config, family)
    check_installed(config.model, folder)
    with out_of_memory.explained(config, "encoding the data set"):
        for rows in encoded(config, family, pairs, folder, loading.encoder_dtype(config.train.mixed_precision)):
            if rows is not None:
                fill_cache(config, rows, accelerator, say)


def check_drop_keys(config: Config, family: Family) -> None:
    """Raises ConfigError where cache.prompt_empty_drop_keys names no text embedding of the family."""
    given = config.cache.prompt_empty_drop_keys or []
    unknown = [name for name in given if name not in family.text_embeddings]
    if unknown:
        raise ConfigError(
            f"cache.prompt_empty_drop_keys={given}: {family.name} has no text embedding {unknown}; "
            f"it has {list(family.text_embeddings)}"
        )
