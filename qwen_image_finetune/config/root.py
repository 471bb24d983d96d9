"""A whole run: all sections, and what no run can have together."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import OmegaConf
from pydantic import PrivateAttr, model_validator

from qwen_image_finetune.config.data import DataConfig
from qwen_image_finetune.config.exclusions import contradictions
from qwen_image_finetune.config.loss import LossConfig
from qwen_image_finetune.config.model import ModelConfig
from qwen_image_finetune.config.outputs import CacheConfig, LoggingConfig, PredictConfig, ValidationConfig
from qwen_image_finetune.config.training import OptimizerConfig, SchedulerConfig, TrainConfig
from qwen_image_finetune.config.tree import shown
from qwen_image_finetune.config.values import Section, refuse


class Config(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: SchedulerConfig = SchedulerConfig()
    cache: CacheConfig = CacheConfig()
    logging: LoggingConfig = LoggingConfig()
    validation: ValidationConfig = ValidationConfig()
    loss: LossConfig = LossConfig()
    predict: PredictConfig = PredictConfig()

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of the configuration should be told once: overruled keys and keys without effect."""
        return tuple(self._notes)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = contradictions(self)
        if self.data.init_args.streaming and not self.cache.use_cache:
            problems.append("data.init_args.streaming=true needs cache.use_cache=true: the pictures are not kept")
        if self.data.init_args.streaming and self.validation.enabled and self.validation.share > 0:
            problems.append(
                f"data.init_args.streaming=true and validation.share={self.validation.share} exclude each other: "
                "held-out pairs are chosen by the looks of all pictures, which are not kept; give "
                "validation.dataset_path"
            )
        if self.loss.mask_loss is True and not self.data.init_args.use_edit_mask:
            problems.append("loss.mask_loss=true needs data.init_args.use_edit_mask=true, which reads the masks")
        if self.loss.mask_loss and self.loss.foreground_weight == self.loss.background_weight == 0:
            problems.append("loss.foreground_weight=0 and loss.background_weight=0: nothing would be trained")
        if self.model.quantize and self.model.lora is None:
            problems.append(
                f"model.quantize={shown(self.model.quantize)} with model.lora=null: a quantised base is frozen and "
                "cannot be fully fine-tuned; set model.quantize=false or give model.lora"
            )
        lora = self.model.lora
        if lora is not None and isinstance(lora.initialisation, str):
            start = f"model.lora.init_lora_weights={shown(lora.initialisation)}"
            if lora.initialisation == "orthogonal" and lora.r % 2:
                problems.append(f"{start} needs an even rank, not model.lora.r={lora.r}")
            if self.model.quantize and lora.initialisation.startswith(("pissa", "olora")):
                problems.append(
                    f"{start} decomposes the base, which model.quantize={shown(self.model.quantize)} quantises: use "
                    'true or "gaussian", or set model.quantize=false'
                )
        if lora is not None and lora.lr_ratio != 1.0 and self.optimizer.finds_its_own_rate:
            problems.append(
                f"model.lora.lr_ratio={lora.lr_ratio:g} and optimizer.class_path={self.optimizer.class_path} exclude "
                "each other: that optimizer finds one rate for all weights; set model.lora.lr_ratio=1.0"
            )
        refuse(problems)
        return self

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps after which training ends, if counted in steps."""
        unlimited = self.train.max_train_steps is None and self.train.num_epochs is None
        return 1000 if unlimited else self.train.max_train_steps

    def to_yaml(self) -> str:
        """The whole configuration, defaults written out, as YAML that `load_config` reads back to an equal one."""
        return OmegaConf.to_yaml(OmegaConf.create(_escaped(self.model_dump(mode="json"))))

    def __eq__(self, other: object) -> bool:
        """Equal keys; the notes about how they were written do not count."""
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


def _escaped(value: Any) -> Any:
    """Text that looks like an interpolation, written so that it is read back as text."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
