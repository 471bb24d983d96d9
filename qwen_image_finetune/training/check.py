"""What a run lacks on this machine, found without opening a picture or a model, so that all of it is said at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_finetune.config import (
    OUR_DATASETS,
    Config,
    ConfigError,
    DatasetArguments,
    OptimizerConfig,
    SchedulerConfig,
    no_folder,
    resolve_family,
)
from qwen_image_finetune.data.sources import needs_tables
from qwen_image_finetune.families import get_family, with_targets
from qwen_image_finetune.levers.stored_precision import check_installed, local_checkpoint
from qwen_image_finetune.lora.header import LoraFileError, read_metadata
from qwen_image_finetune.lora.sources import find_lora
from qwen_image_finetune.training.online import unavailable

if TYPE_CHECKING:
    from qwen_image_finetune.families.base import Family


def check_run(config: Config, download: bool = False) -> None:
    """Refuse what would fail after the models have loaded: nobody waits for minutes to hear it.

    Args:
        download: what lies on the hub is asked for.

    Raises:
        ConfigError: every problem, one line each.
    """
    if found := run_problems(config, download):
        raise refusal(found)


def refusal(problems: Sequence[str]) -> ConfigError:
    """All problems as one error."""
    words = problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems:", *problems])
    found = ConfigError(words)
    found.problems = tuple(problems)
    return found


def run_problems(config: Config, download: bool = False) -> list[str]:
    """One line for each: a folder, a checkpoint or a LoRA that is not there; a package that is not installed; an
    optimizer or schedule that cannot be built; text embeddings the family does not have; an adapter that does not fit a
    checkpoint of this machine (with `download`, `check_transformer` is for when it is here)."""
    problems = [*_folders(config), *_samples(config), *_resume(config)]
    if absent := unavailable(config.logging.trackers):
        problems.append(f"logging.report_to names {absent}, not installed here: pip install {' '.join(absent)}")
    if config.train.attention == "flash4" and find_spec("flash_attn") is None:
        problems.append(
            "train.attention='flash4' needs flash-attn-4, not installed here: pip install "
            "'qwen-image-finetune[flash4]', or use train.attention=auto"
        )
    checks: list[Callable[[], None]] = [
        lambda: check_installed(config.model, local_checkpoint(config.model)),
        *(partial(_check_lora, key, lora, download) for key, lora in config.model.loras),
    ]
    if find_spec("torch") is not None:  # a dry run goes without
        checks += [lambda: _check_optimizer(config), lambda: _check_drop_keys(config, download)]
        checks.append(lambda: _check_adapter_name(config))
        if not download and (checkpoint := local_checkpoint(config.model)) is not None:
            checks.append(lambda: _check_checkpoint(config, checkpoint))
    for check in checks:
        try:
            check()
        except (ConfigError, LoraFileError) as error:
            if str(error) not in problems:
                problems.append(str(error))
    return problems


def model_notes(config: Config) -> list[str]:
    """What should be said of a checkpoint of this machine before it is trained; nothing about others."""
    checkpoint = local_checkpoint(config.model)
    if checkpoint is None or find_spec("torch") is None:
        return []
    from qwen_image_finetune.loading import pipeline_config, transformer_config

    family = get_family(resolve_family(config)[0])
    said = family.distilled(pipeline_config(checkpoint), transformer_config(checkpoint))
    return [] if said is None else [f"{config.model.pretrained_model_name_or_path}: {said}"]


def check_transformer(config: Config, family: Family, checkpoint: Path) -> None:
    """Refuse a transformer whose tensors are not those of its configuration, by their headers; an adapter, or a LoRA
    that it starts from, that does not fit it. No weight of it is read.

    Raises:
        ConfigError, LoraFileError: it does not; or the installed diffusers does not know this transformer.
    """
    from qwen_image_finetune import loading
    from qwen_image_finetune.lora.adapters import check_adapter
    from qwen_image_finetune.lora.files import check_lora

    lora = with_targets(config, family).model.lora
    transformer = loading.check_base(family, checkpoint, config.model)
    if lora is not None:
        check_adapter(transformer, lora)
        if lora.pretrained_weight is not None and config.train.resume_from_checkpoint is None:
            check_lora(transformer, lora.pretrained_weight, family.naming, lora)


def _check_checkpoint(config: Config, checkpoint: Path) -> None:
    check_transformer(config, get_family(resolve_family(config)[0]), checkpoint)


def _folders(config: Config) -> Iterator[str]:
    """Data sets that are not there; a class of the user's own may mean something else by their path."""
    if config.data.class_path not in OUR_DATASETS:
        return
    given = {"data.init_args.dataset_path": config.data.init_args.dataset_path}
    if config.validation.enabled and config.validation.dataset_path is not None:
        given["validation.dataset_path"] = config.validation.dataset_path
    if config.loss.preserves and config.loss.preservation.dataset_path is not None:
        given["loss.preservation.dataset_path"] = config.loss.preservation.dataset_path
    for key, paths in given.items():
        for entry in DatasetArguments(dataset_path=paths).entries:
            folder = Path(entry.path).expanduser()
            if not entry.on_hub and not folder.exists():
                yield f"{key}={entry.path!r}: {no_folder(folder)}"
            if needs_tables(entry) and find_spec("pyarrow") is None:
                yield (
                    f"{key}={entry.path!r}: parquet and arrow files need pyarrow, not installed here: pip install "
                    "'qwen-image-finetune[datasets]'"
                )


def _samples(config: Config) -> Iterator[str]:
    """References of prompts of one's own that are not there."""
    for place, sample in enumerate(config.validation.samples if config.validation.enabled else []):
        for path in sample.paths:
            if not path.is_file():
                yield f"validation.samples[{place}].references: {str(path)!r} is no file"


def _resume(config: Config) -> Iterator[str]:
    """A checkpoint that is not there. What is in it is verified when the run begins, to the last byte."""
    spec = config.train.resume_from_checkpoint
    if spec not in (None, "latest") and not os.path.isdir(folder := Path(spec).expanduser()):
        yield f'train.resume_from_checkpoint={spec!r} is neither "latest" nor a folder: {no_folder(folder)}'


def _check_lora(key: str, weight: str, download: bool) -> None:
    path = Path(weight).expanduser()
    names = 3 if path.suffix == ".safetensors" else 2  # of OWNER/NAME/FILE
    on_hub = len(path.parts) == names and not os.path.isdir(path.parts[0])  # else a mistyped path of this machine
    if not (path.exists() or on_hub):
        raise ConfigError(
            f"{key}={weight!r}: not in {path.absolute().parent}; give a .safetensors file, a "
            "folder with one, or OWNER/NAME on the hub"
        )
    if path.exists() or download:
        read_metadata(find_lora(weight))


def _check_optimizer(config: Config) -> None:
    if is_plain(config.optimizer, config.lr_scheduler):
        return  # no reason to load torch for a look
    import torch

    from qwen_image_finetune.training.optim import MUON, build_optimizer, build_scheduler

    weight = torch.nn.Parameter(torch.zeros(2, 2))  # of an adapter; a whole transformer has vectors too
    vectors = [torch.nn.Parameter(torch.zeros(2))] if config.model.lora is None or config.model.lora.use_dora else []
    if vectors and config.optimizer.class_path == "torch.optim.Muon":
        raise ConfigError(
            "optimizer.class_path=torch.optim.Muon updates matrices alone, and vectors are trained too: "
            f"{MUON} updates those with AdamW (pip install 'qwen-image-finetune[optimizers]')"
        )
    stand_in = build_optimizer(config.optimizer, [weight, *vectors])
    if config.optimizer.class_path.startswith("torch.optim."):
        weight.grad = torch.zeros(2, 2)
        try:
            stand_in.step()
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"optimizer.class_path={config.optimizer.class_path} cannot take a step here: {error}"
            ) from error
    build_scheduler(config.lr_scheduler, stand_in, total_steps=config.max_steps or 1)


def _check_adapter_name(config: Config) -> None:
    """peft keeps adapters in a ModuleDict by their names, which cannot be names of its own."""
    name = config.model.lora.adapter_name if config.model.lora is not None else "default"
    if name == "default":
        return
    import torch

    if name in dir(torch.nn.ModuleDict()):
        raise ConfigError(f"model.lora.adapter_name={name!r} is a word of torch's own; choose another name")


def is_plain(optimizer: OptimizerConfig, scheduler: SchedulerConfig) -> bool:
    """Whether optimizer and schedule can certainly be built: Adam or AdamW with numbers that they take, and any
    schedule but a polynomial decay, which depends on the learning rate."""
    adam = optimizer.class_path in ("torch.optim.Adam", "torch.optim.AdamW")
    return (
        adam
        and scheduler.scheduler_type != "polynomial"
        and all(_is_taken(name, value) for name, value in optimizer.init_args.items())
    )


def _is_taken(name: str, value: Any) -> bool:
    """Whether Adam takes this argument; not all that it takes is known here."""
    if name == "betas":
        return isinstance(value, list | tuple) and len(value) == 2 and all(_lies_below(beta, 1.0) for beta in value)
    return name in ("lr", "eps", "weight_decay") and _lies_below(value, math.inf)


def _lies_below(value: Any, end: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < end


def _check_drop_keys(config: Config, download: bool) -> None:
    if config.cache.prompt_empty_drop_keys is None:
        return
    from qwen_image_finetune.encoding.embeddings import check_drop_keys

    family, source = resolve_family(config, download)
    if not source.startswith("assumed"):
        check_drop_keys(config, get_family(family))
