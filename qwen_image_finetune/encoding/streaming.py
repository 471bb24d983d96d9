"""Data sets that fit no disk: each shard is brought here, encoded into the cache, and removed again."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config, DatasetArguments
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.hub import hub_shards
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.data.left_out import LeftOut
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.data.shard_index import Shard, read_shard, remove
from qwen_image_finetune.data.sources import of_set, prefixes, shared_of
from qwen_image_finetune.encoding.cache import EncodedDataset
from qwen_image_finetune.encoding.limits import check_rows, reference_problems
from qwen_image_finetune.encoding.pairs import bad_rows, training_settings
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.machine import console
from qwen_image_finetune.machine.accelerator import build_team, encoder_homes

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from diffusers import DiffusionPipeline


class _OneShard(ImageDataset):
    """The rows of one shard, with the keys that they have in the whole data set: random crops follow from them."""

    def __init__(self, shard: Shard, number: int, prefix: str, config: Config, family: Family) -> None:
        """
        Args:
            number: of its data set among those of the configuration.
        """
        self._shard, self._number, self._prefix = shard, number, prefix
        super().__init__(
            config.data.init_args, family.size, family.side_multiple, family.max_references, config.train.seed,
            family.scaled, family.resampling,
        )  # fmt: skip

    def _list(self, arguments: DatasetArguments) -> list[Row]:
        home = Path(arguments.shards_dir).expanduser()
        columns = arguments.entries[self._number].columns
        rows, found = read_shard(self._shard, columns, home, masks=arguments.use_edit_mask, keep=True)
        rows, more = of_set(rows, shared_of(arguments, self._number))
        self._problems = found + more
        return [replace(row, key=self._prefix + row.key) for row in rows]


def fill_by_shard(config: Config, family: Family, accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Encode what the cache lacks of every shard on the hub, one shard after the other; nothing without streaming.

    Both encoders are in memory meanwhile. Processes take turns at the shards. A run that was interrupted goes on with
    the shard that it was at.

    Raises:
        DataError: rows of a shard that cannot be trained on; what was encoded before stays.
        ShardError: the hub cannot be reached.
    """
    if not config.data.init_args.streaming:
        return
    team = build_team(accelerator)
    entries = config.data.init_args.entries
    home = Path(config.data.init_args.shards_dir).expanduser()
    every = [
        (shard, number, prefix)
        for number, (entry, prefix) in enumerate(zip(entries, prefixes(entries), strict=True))
        if entry.on_hub
        for shard in hub_shards(entry, home)
    ]
    pipe: DiffusionPipeline | None = None
    written = 0
    checkpoint = loading.checkpoint_folder(config, family)
    dtype = loading.encoder_dtype(config.train.mixed_precision)
    held_out = config.validation.enabled and config.validation.dataset_path is not None
    settings = training_settings(config, held_out=held_out)
    for place, (shard, number, prefix) in enumerate(every):
        if place % team.size != team.rank:
            continue
        try:
            dataset = _OneShard(shard, number, prefix, config, family)
            if config.data.max_bad_share:  # whether they are too many is known once all shards are
                bad = bad_rows(family, dataset, decode=False)
                dataset.leave_out([LeftOut(key, tuple(lines)) for key, lines in bad.items()])
            if problems := dataset.check() or reference_problems(family, dataset):
                raise DataError(problems)
            rows = EncodedDataset(settings, family, dataset, checkpoint, dtype)
            with rows.store.filling():
                missing = rows.missing()
                if not missing:
                    continue
                check_rows(rows, rows.rows_lacking(missing))
                if pipe is None:
                    homes = encoder_homes(config.cache, "cache", accelerator.device, team)
                    pipe = loading.load_encoders(
                        family, checkpoint, dtype, homes, text_format=rows.text_format, say=say
                    )
                title = f"shard {place + 1} of {len(every)}"
                with console.progress(title, len(missing), shown=team.main) as update:
                    keys = chain(rows.encode_texts(pipe, missing.texts), rows.encode_images(pipe, missing.images))
                    for done, _ in enumerate(keys, start=1):
                        update(done)
                written += len(missing)
        finally:
            remove(shard)
    if pipe is not None:
        say(f"{written} entries of {len(every)} shards are in {config.cache.cache_dir}")
    del pipe
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    team.meet("encoding shards")
