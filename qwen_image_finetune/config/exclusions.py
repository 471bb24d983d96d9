"""Settings of a run that exclude each other: one table, which the configuration check reads and a test walks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_image_finetune.config.loss import LossConfig
from qwen_image_finetune.config.model import ModelConfig
from qwen_image_finetune.config.training import OptimizerConfig, TrainConfig
from qwen_image_finetune.config.tree import find, shown


class Settings(Protocol):
    """What the table looks at in a configuration."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def loss(self) -> LossConfig: ...
    def model_dump(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Setting:
    """One side of a pair."""

    key: str
    applies: Callable[[Settings], bool]
    example: tuple[str, ...]  # overrides that make it apply, for the test that walks the table


@dataclass(frozen=True)
class Exclusion:
    """Two settings that no run has both of, why, and what to do instead."""

    first: Setting
    second: Setting
    why: str


# Optimizers whose step treats each weight by itself.
ALONE = ("torch.optim.", "bitsandbytes.optim.")

SWAP = Setting(
    "train.blocks_to_swap",
    lambda c: c.train.blocks_to_swap != 0 and c.train.memory != "auto",
    ("train.blocks_to_swap=1",),
)
RELEASE = Setting("train.release_gradients", lambda c: c.train.release_gradients, ("train.release_gradients=true",))
COMPILE = Setting("train.compile", lambda c: c.train.compile is True, ("train.compile=true",))
FULL = Setting("model.lora", lambda c: c.model.lora is None, ("model.lora=null",))

ADAPTER = Setting("model.lora", lambda c: c.model.lora is not None, ("model.lora={r: 4}",))
TOGETHER = Setting(
    "optimizer.class_path",
    lambda c: not c.optimizer.class_path.startswith(ALONE) or c.optimizer.class_path.endswith("LBFGS"),
    ("optimizer.class_path=prodigyopt.Prodigy",),
)
ROUNDED = Setting(
    "train.weight_precision", lambda c: c.train.weight_precision == "bf16", ("train.weight_precision=bf16",)
)

PRESERVATION = Setting(
    "loss.preservation.weight", lambda c: c.loss.preservation.weight > 0, ("loss.preservation.weight=0.5",)
)

EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        SWAP,
        Setting(
            "train.gradient_checkpointing",
            lambda c: not c.train.gradient_checkpointing,
            ("train.gradient_checkpointing=false",),
        ),
        "without recomputation every block keeps its weights on the card for its backward pass; set "
        "train.gradient_checkpointing=true",
    ),
    Exclusion(SWAP, FULL, "swapped weights are never written back, so they cannot be trained; give model.lora"),
    Exclusion(
        SWAP, COMPILE, "a compiled block keeps its weights on the card for its backward pass; set train.compile=false"
    ),
    Exclusion(
        RELEASE,
        ADAPTER,
        "the gradients of an adapter are too small to be worth it; set train.release_gradients=false",
    ),
    Exclusion(
        RELEASE,
        Setting(
            "train.gradient_accumulation_steps",
            lambda c: c.train.gradient_accumulation_steps > 1,
            ("train.gradient_accumulation_steps=2",),
        ),
        "a gradient that is gone after one backward pass cannot be summed over several; use data.batch_size",
    ),
    Exclusion(
        RELEASE,
        Setting("train.max_grad_norm", lambda c: c.train.max_grad_norm is not None, ("train.max_grad_norm=1.0",)),
        "the norm of all gradients is known when most of them are already used; set train.max_grad_norm=null",
    ),
    Exclusion(
        RELEASE,
        Setting("train.mixed_precision", lambda c: c.train.mixed_precision == "fp16", ("train.mixed_precision=fp16",)),
        "loss scaling looks at all gradients before it uses one; use bf16",
    ),
    Exclusion(
        RELEASE,
        TOGETHER,
        "it may look at all gradients together; use one of torch.optim (not LBFGS) or bitsandbytes.optim",
    ),
    Exclusion(ROUNDED, ADAPTER, "an adapter is small, and is trained in float32; set train.weight_precision=fp32"),
    Exclusion(
        ROUNDED,
        Setting("train.mixed_precision", lambda c: c.train.mixed_precision != "bf16", ("train.mixed_precision=no",)),
        "the forward pass would not see what the weights are; set train.mixed_precision=bf16",
    ),
    Exclusion(
        ROUNDED,
        TOGETHER,
        "weights are widened one after the other, and it may look at all together; use one of torch.optim (not LBFGS) "
        "or bitsandbytes.optim",
    ),
    Exclusion(
        PRESERVATION,
        FULL,
        "the model's own answers come from the base, of which full fine-tuning would need a second copy; give "
        "model.lora, or set loss.preservation.weight=0",
    ),
)


def contradictions(config: Settings) -> list[str]:
    """One line for each pair of the table that this run has both of."""
    values: dict[str, Any] = config.model_dump()
    return [
        f"{_shown(values, pair.first.key)} and {_shown(values, pair.second.key)} exclude each other: {pair.why}"
        for pair in EXCLUSIONS
        if pair.first.applies(config) and pair.second.applies(config)
    ]


def _shown(values: dict[str, Any], key: str) -> str:
    value = find(values, key)
    return key if isinstance(value, dict) else f"{key}={shown(value)}"
