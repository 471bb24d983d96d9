"""What `qif bench CONFIG --quick` measured, kept in the cache's folder for `auto`: a file for each card."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qwen_image_finetune.config import Config
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.fitting.estimate import Estimator


def label(format: str | None, compiled: bool) -> str:
    """The name of a candidate."""
    return f"{format or '16 bits'}{', compiled' if compiled else ''}"


def read(estimator: Estimator) -> dict[str, float]:
    """Seconds of an optimizer step by label; empty where nothing like this run was measured on this card.

    A file that cannot be read counts as none: it is only a memory.
    """
    try:
        kept = json.loads(file_of(estimator.config).read_text(encoding="utf-8"))[run_key(estimator)]
        return {str(name): float(value) for name, value in kept["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(estimator: Estimator, seconds: dict[str, float]) -> Path:
    """Add what was measured of a run; a newer measurement of the same takes the older's place."""
    file = file_of(estimator.config)
    try:
        known: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    known[run_key(estimator)] = {**about(estimator), **machine(), "seconds": seconds}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(known, indent=1) + "\n")
    return file


def file_of(config: Config) -> Path:
    """Where it is kept."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    name = re.sub(r"\W+", "-", card).strip("-").lower()
    return Path(config.cache.cache_dir).expanduser() / f"speed-{name}.json"


def about(estimator: Estimator) -> dict[str, Any]:
    """What decides the time of a step beside what `auto` chooses."""
    config, train = estimator.config, estimator.config.train
    lora = config.model.lora
    return {
        "family": estimator.family.name,
        "weights": estimator.footprint.weights,
        "adapter": estimator.footprint.adapter,
        "lora": lora is not None,
        "sizes": [list(size) for size in estimator.sizes],
        "batch": config.data.batch_size,
        "accumulation": train.gradient_accumulation_steps,
        "preserves": config.loss.preserves,
        "precision": train.mixed_precision,
        "attention": train.attention,
        "memory": [train.memory, train.gradient_checkpointing, train.keep_activations, train.blocks_to_swap,
                   train.offload_activations, train.low_memory],
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What decides it beside that: with another torch, driver or card, what was measured counts no longer."""
    kernels = [_version(name) for name in ("flash-attn-4", "bitsandbytes", "triton")]
    return {"torch": torch.__version__, "driver": driver(), "card": card(), "kernels": kernels}


def card() -> list[Any] | None:
    """Name, bytes and multiprocessors: cards of one name differ in the latter two."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties()
    return [found.name, found.total_memory, found.multi_processor_count]


def driver() -> str | None:
    """Version of the kernel's module for NVIDIA's cards; None where there is none to be read."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_key(estimator: Estimator) -> str:
    """A name for all of that."""
    decides = {**about(estimator), **machine()}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
