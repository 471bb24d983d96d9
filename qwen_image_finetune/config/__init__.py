"""Every knob, checked before anything heavy is imported.

A configuration is YAML with ``${section.key}`` interpolation. `load_config` reads it, applies ``section.key=value``
overrides, moves older spellings to today's, and validates the rest; whatever is wrong comes back in one `ConfigError`
that names the key, what was given and what is allowed.

    root           a whole run                          values         what keys may hold
    model, lora, data, training, loss, outputs          the sections: one frozen model each, a line of meaning a key
    spellings      older names of keys                  exclusions     what no run has together
    text           YAML, safely                         interpolation  ${section.key}
    words, idle    problems and notes in words          family         which family a checkpoint is
    classes        classes named by import path         reference      docs/configuration.md
"""

from qwen_image_finetune.config.classes import import_class
from qwen_image_finetune.config.data import OUR_DATASETS, Columns, DataConfig, DataEntry, DatasetArguments, areas
from qwen_image_finetune.config.family import resolve_family
from qwen_image_finetune.config.load import load_config
from qwen_image_finetune.config.lora import BaseLora, LoraConfig
from qwen_image_finetune.config.loss import LossConfig, PreservationConfig
from qwen_image_finetune.config.model import ModelConfig
from qwen_image_finetune.config.outputs import (
    CacheConfig,
    LoggingConfig,
    PredictConfig,
    PredictDevices,
    SampleConfig,
    ValidationConfig,
)
from qwen_image_finetune.config.root import Config
from qwen_image_finetune.config.spellings import SPELLINGS
from qwen_image_finetune.config.training import EmaConfig, OptimizerConfig, SchedulerConfig, TrainConfig
from qwen_image_finetune.config.values import ConfigError
from qwen_image_finetune.config.words import no_folder

__all__ = [
    "OUR_DATASETS",
    "SPELLINGS",
    "BaseLora",
    "CacheConfig",
    "Columns",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataEntry",
    "DatasetArguments",
    "EmaConfig",
    "LoggingConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PredictConfig",
    "PredictDevices",
    "PreservationConfig",
    "SampleConfig",
    "SchedulerConfig",
    "TrainConfig",
    "ValidationConfig",
    "areas",
    "import_class",
    "load_config",
    "no_folder",
    "resolve_family",
]
