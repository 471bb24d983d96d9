"""What a LoRA file says about itself, as plain strings.

`lora_adapter_metadata` is what diffusers reads, `ss_*` are kohya's words that most tools show, `modelspec.*` follow the
model metadata standard of Stability AI (https://github.com/Stability-AI/ModelSpec), and `qif.*` are ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from qwen_image_finetune.config import Config, LoraConfig
from qwen_image_finetune.lora.header import ADAPTER_METADATA
from qwen_image_finetune.lora.layers import Changed, Layer, kind_of
from qwen_image_finetune.lora.targets import endings


def peft_fields(layers: Mapping[str, Layer], targets: Iterable[str] | str) -> dict[str, Any]:
    """The part of a peft configuration that says how the weights are meant; patterns where modules differ."""
    rank, alpha = most(layer.rank for layer in layers.values()), most(layer.alpha for layer in layers.values())
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "rank_pattern": {_anchored(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {_anchored(name): _plain(x.alpha) for name, x in layers.items() if x.alpha != alpha},
        **({"use_dora": True} if any(layer.magnitude is not None for layer in layers.values()) else {}),
    }


def adapter_metadata(layers: Mapping[str, Changed], targets: Iterable[str] | str) -> dict[str, str]:
    """`peft_fields` of a LoRA as diffusers keeps them in the file; of other kinds it looks at the tensors."""
    loras = {name: layer for name, layer in layers.items() if isinstance(layer, Layer)}
    if len(loras) < len(layers):
        return {}
    fields = {f"transformer.{key}": value for key, value in peft_fields(loras, targets).items()}
    return {ADAPTER_METADATA: json.dumps(fields, sort_keys=True)}


def network_metadata(layers: Mapping[str, Changed]) -> dict[str, str]:
    """Kind, rank and alpha in kohya's words."""
    kind, alphas = kind_of(layers), [layer.alpha for layer in layers.values() if isinstance(layer, Layer)]
    about = {"ss_network_module": "networks.lora"}
    if not alphas:  # the scale is inside
        about = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": kind.lower()})}
        alphas = [float(layer.rank) for layer in layers.values()]
    return {
        **about,
        "ss_network_dim": str(most(layer.rank for layer in layers.values())),
        "ss_network_alpha": str(_plain(most(alphas))),
        "qif.target_modules": json.dumps(endings(layers)),
    }


def model_metadata(transformer: nn.Module, config: LoraConfig) -> dict[str, str]:
    """What the adapter itself knows."""
    return {
        "ss_base_model_version": type(transformer).__name__,
        "ss_network_dropout": str(config.lora_dropout),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{type(transformer).__name__}/lora",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": "LoRA",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "qif.init_lora_weights": json.dumps(config.init_lora_weights),
        **{f"qif.{key}": json.dumps(getattr(config, key)) for key in ("type", "use_dora", "use_rslora")},
        "qif.lora_alpha": str(_plain(config.lora_alpha)),  # it was trained with; the scale is inside the factors
    }


def run_metadata(config: Config, steps: int, base: Path) -> dict[str, str]:
    """What a run adds, for `save_lora`: nothing of the data or of where it lies on this machine.

    Args:
        steps: optimizer steps taken.
        base: folder of the checkpoint; of one in the hub's cache, its repository and commit are told.
    """
    arguments, train = config.data.init_args, config.train
    name = PurePath(config.model.pretrained_model_name_or_path).name
    about = {
        **hub_revision(base),
        "ss_base_model_version": name,
        "ss_sd_model_name": name,
        "ss_output_name": config.logging.tracker_project_name,
        "ss_steps": str(steps),
        "ss_seed": str(train.seed),
        "ss_learning_rate": str(config.optimizer.init_args.get("lr", "")),
        "ss_optimizer": config.optimizer.class_path,
        "ss_lr_scheduler": config.lr_scheduler.scheduler_type,
        "ss_lr_warmup_steps": str(config.lr_scheduler.warmup_steps),
        "ss_batch_size_per_device": str(config.data.batch_size),
        "ss_gradient_accumulation_steps": str(train.gradient_accumulation_steps),
        "ss_gradient_checkpointing": str(train.gradient_checkpointing),
        "ss_mixed_precision": train.mixed_precision,
        "ss_max_grad_norm": str(train.max_grad_norm),
        "modelspec.title": config.logging.tracker_project_name,
        "qif.config_sha256": hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
    }
    size, area = arguments.largest
    if area is not None:
        about |= {"ss_resolution": f"({size[0]}, {size[1]})", "modelspec.resolution": f"{size[0]}x{size[1]}"}
    try:
        about["qif.version"] = version("qwen-image-finetune")
    except PackageNotFoundError:  # run from a checkout that was never installed
        about["qif.version"] = "unknown"
    return about


def hub_revision(path: Path) -> dict[str, str]:
    """Repository and commit of what lies in the hub's cache, models--OWNER--NAME/snapshots/COMMIT; else nothing."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(/|$)", path.absolute().as_posix())
    return {} if found is None else {"qif.base": f"{found[1]}/{found[2]}", "qif.base_revision": found[3]}


def most(values: Iterable[Any]) -> Any:
    """The value that occurs most often."""
    return Counter(values).most_common(1)[0][0]


def _anchored(module: str) -> str:
    return f"^{re.escape(module)}"


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number
