"""`qif train`, `qif cache` and `qif bench --quick`: a configuration is read, checked, and done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image_finetune.command.saying import loading, read_config
from qwen_image_finetune.machine import journal

if TYPE_CHECKING:
    from qwen_image_finetune.config import Config


def run_training(config_file: Path, overrides: Sequence[str], dry_run: bool = False, only_cache: bool = False) -> None:
    """What `qif train`, `qif cache` and `python -m src.main` share."""
    from qwen_image_finetune.machine.signals import StopSignals

    with StopSignals(), journal.recording():  # from the first moment: packages alone take seconds to load
        config = read_config(config_file, overrides)
        if dry_run:
            from qwen_image_finetune.command.dry_run import show

            show(config)
            return
        check_folders(config, only_cache)
        loading()
        if only_cache:
            from qwen_image_finetune.trainer import Trainer

            Trainer(config).cache()
        else:
            from qwen_image_finetune.training.train import train

            train(config)


def check_folders(config: Config, only_cache: bool) -> None:
    """Refuse folders that cannot be written within a moment, before a heavy package is imported."""
    from qwen_image_finetune.disk.files import check_writable

    if not only_cache:
        check_writable(config.logging.project_dir, "logging.output_dir")
    if only_cache or config.cache.use_cache:
        check_writable(Path(config.cache.cache_dir).expanduser(), "cache.cache_dir")


def quick_bench(file: Path, overrides: Sequence[str]) -> None:
    """`qif bench CONFIG --quick`."""
    config = read_config(file, overrides)
    check_folders(config, only_cache=True)
    loading()
    from qwen_image_finetune.config import resolve_family
    from qwen_image_finetune.encoding.pairs import open_pairs
    from qwen_image_finetune.families import get_family, with_targets
    from qwen_image_finetune.fitting import quick
    from qwen_image_finetune.training.job import largest_sample

    family = get_family(resolve_family(config)[0])
    config = with_targets(config, family)
    pairs = open_pairs(config, family)
    quick.run(config, family, largest_sample(pairs.training, pairs.preserved))
