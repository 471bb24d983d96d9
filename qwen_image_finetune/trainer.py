"""The Python interface: one object that caches, trains and predicts a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from qwen_image_finetune.config import Config, ConfigError, resolve_family
from qwen_image_finetune.drawing.tuned import TunedPredictor


class Trainer(TunedPredictor):
    """Caches, trains and predicts one configuration, of any family.

    Raises:
        ConfigError: the configuration's checkpoint or train.trainer names another family than the class asks for.
    """

    family: ClassVar[str | None] = None  # None takes what the configuration says

    def __init__(self, config: Config) -> None:
        name, source = resolve_family(config, download=True)
        if self.family is not None and name != self.family:
            raise ConfigError(f"{type(self).__name__} trains {self.family}, but {source} says {name}")
        super().__init__(config)

    def cache(self) -> None:
        """Compute the embeddings of the dataset and keep them.

        Raises:
            ConfigError: what this run would lack on this machine, its training included: better now than afterwards.
        """
        from qwen_image_finetune.encoding.embeddings import encode_dataset
        from qwen_image_finetune.training.check import check_run

        check_run(self.config, download=True)
        encode_dataset(self.config)

    def fit(self) -> Path | None:
        """Train; returns the version folder (None in all processes but the first)."""
        from qwen_image_finetune.training.train import train

        return train(self.config)


# The guide's names; a family needs none of its own.


class FluxKontextLoraTrainer(Trainer):
    """`Trainer` for FLUX.1 Kontext."""

    family = "FluxKontext"


class QwenImageEditTrainer(Trainer):
    """`Trainer` for Qwen-Image-Edit."""

    family = "QwenImageEdit"
