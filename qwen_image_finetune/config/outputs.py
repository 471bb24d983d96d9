"""What a run keeps, writes and draws: the sections `cache`, `logging`, `validation` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from qwen_image_finetune.config.data import DatasetPath
from qwen_image_finetune.config.tree import shown
from qwen_image_finetune.config.values import (
    Allowed,
    Count,
    Device,
    FolderName,
    Natural,
    Number,
    Section,
    Seed,
    Switch,
    Text,
)


def _null_is_none(value: Any) -> Any:
    """YAML's null where a tracker is expected means none of them."""
    return "none" if value is None else value


class CacheConfig(Section):
    """Embeddings computed once."""

    use_cache: Switch = Field(False, description="train from stored embeddings; missing ones are encoded first")
    cache_dir: Text = Field("cache", description="folder of the store")
    vae_encoder_device: Device | None = Field(None, description="where the VAE lives while caching")
    text_encoder_device: Device | None = Field(None, description="the same for the (first) text encoder")
    text_encoder_2_device: Device | None = Field(None, description="the same for the second text encoder")
    prompt_empty_drop_keys: list[Text] | None = Field(
        None, description="text embeddings that the dropped prompt replaces; default: all"
    )
    num_variations: Count = Field(
        1, description="random crops and flips of each sample that are stored; its visits take turns"
    )


Tracker = Literal["tensorboard", "wandb", "swanlab", "trackio", "mlflow", "none"]


class LoggingConfig(Section):
    """Where a run is written and who is told."""

    output_dir: Text = Field("output", description="runs go to OUTPUT_DIR/PROJECT/vN")
    logging_dir: Text = Field("logs", description="local files of online trackers, inside the version folder")
    report_to: Annotated[Tracker | list[Tracker], BeforeValidator(_null_is_none)] = Field(
        "tensorboard", description="tracker, or a list of them"
    )
    tracker_project_name: FolderName = Field(
        "qwen_image_finetune", description="PROJECT: folder of the versions, and project at the trackers"
    )

    @model_validator(mode="after")
    def _consistent(self) -> LoggingConfig:
        if isinstance(self.report_to, list) and "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"logging.report_to={shown(self.report_to)}: none excludes the others")
        return self

    @property
    def project_dir(self) -> Path:
        """The folder of the versions."""
        return Path(self.output_dir).expanduser() / self.tracker_project_name

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers that are told; none for "none"."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return tuple(name for name in names if name != "none")


class SampleConfig(Section):
    """A prompt of one's own, drawn while training."""

    prompt: Text = Field(description="the instruction")
    references: Text | list[Text] = Field([], description="picture, or list of pictures, that it is about")
    seed: Seed | None = Field(None, description="of the noise; default: validation.seed")

    @property
    def paths(self) -> tuple[Path, ...]:
        """The references as absolute paths."""
        given = [self.references] if isinstance(self.references, str) else self.references
        return tuple(Path(path).expanduser().absolute() for path in given)


class ValidationConfig(Section):
    """Samples drawn, and the loss on held-out pairs measured, while training."""

    enabled: Switch = Field(False, description="draw samples during training, and measure the held-out loss")
    steps: Count = Field(500, description="optimizer steps between rounds of samples")
    dataset_path: DatasetPath | None = Field(None, description="held-out pairs, named like data.init_args.dataset_path")
    share: Annotated[float, Field(ge=0.0, lt=1.0), Allowed("number from 0 to below 1")] = Field(
        0.0, description="share of the dataset to hold out instead, chosen by content; it is not trained on"
    )
    num_loss_pairs: Natural = Field(32, description="held-out pairs whose loss is measured; 0 for none")
    num_loss_sigmas: Count = Field(4, description="fixed noise levels of each of them")
    num_validation_samples: Count = Field(4, description="pairs drawn, spread over the held-out ones, or over all")
    samples: Annotated[list[SampleConfig], Allowed("list of sections: prompt, references, seed")] = Field(
        [],
        description="prompts of one's own, drawn beside the pairs: each with a prompt, references (a path, a list of "
        "them, or none) and maybe a seed",
    )
    num_inference_steps: Count | None = Field(None, description="sampler steps; default: the model's own")
    guidance_scale: Number | None = Field(None, description="default: the model's own")
    seed: Seed = Field(0, description="noise of the samples and of the held-out loss")

    @model_validator(mode="after")
    def _consistent(self) -> ValidationConfig:
        if self.dataset_path is not None and self.share > 0:
            raise ValueError(
                f"validation.dataset_path={shown(self.dataset_path)} and validation.share={self.share} exclude each "
                "other: give one of them"
            )
        return self


class PredictDevices(Section):
    """Where each part lives at prediction."""

    vae: Device | None = Field(None, description="the VAE")
    text_encoder: Device | None = Field(None, description="the (first) text encoder")
    text_encoder_2: Device | None = Field(None, description="the second text encoder")
    transformer: Device | None = Field(None, description="the transformer")


class PredictConfig(Section):
    """Pictures from a trained model."""

    devices: PredictDevices = Field(PredictDevices(), description="placement; default: the first accelerator, else cpu")
