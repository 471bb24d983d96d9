"""Every knob, checked before anything heavy is imported.

A configuration is YAML with ``${section.key}`` interpolation. `load_config` reads it, applies ``section.key=value``
overrides, moves older spellings to today's, and validates the rest; whatever is wrong comes back in one `ConfigError`
that names the key, what was given and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

OUR_DATASETS = ("src.data.dataset.ImageDataset", "qwen_image_finetune.data.dataset.ImageDataset")


class ConfigError(ValueError):
    """A configuration that cannot be run, in words for the person who wrote it."""


def _whole(value: Any) -> Any:
    """YAML writes 1000.0 or 1e3 for a count; a bool is not one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Rate = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Device = Annotated[str, Field(pattern=r"^(cpu|mps|(cuda|xpu|npu)(:\d+)?)$")]
ClassPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]


class Section(BaseModel):
    """A part of the configuration: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class LoraConfig(Section):
    """A low-rank adapter, as in peft."""

    r: Count = Field(16, description="rank of the adapter")
    lora_alpha: Positive = Field(16, description="the update is scaled by lora_alpha / r")
    lora_dropout: Rate = Field(0.0, description="share of adapter inputs zeroed while training")
    init_lora_weights: bool | str = Field(
        True, description='true (B = 0, A Kaiming), "gaussian", "orthogonal", "pissa", "pissa_niter_N" or "olora"'
    )
    target_modules: list[str] | str = Field(
        ["to_q", "to_k", "to_v", "to_out.0"],
        description='list of module name endings, or one regular expression over whole names, or "all-linear"',
    )
    adapter_name: str = Field("default", description="name of the adapter inside the model", pattern=r"^[A-Za-z_]\w*$")
    pretrained_weight: str | None = Field(None, description="file, folder or hub id of a LoRA to start from")


class ModelConfig(Section):
    """What is trained."""

    pretrained_model_name_or_path: str = Field(description="hub id or folder in diffusers layout", min_length=1)
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    quantize: bool | Literal["fp8", "nf4", "fp4", "int8"] = Field(
        False, description="quantise the frozen base while loading; true means fp8"
    )
    lora: LoraConfig | None = Field(
        LoraConfig(), description="the adapter; null, written out, trains the whole transformer"
    )


class DatasetArguments(Section):
    """Arguments of the dataset class (data.init_args)."""

    model_config = ConfigDict(extra="allow")  # a class of the user's own may take more; ours is checked in DataConfig

    dataset_path: str | list[str] = Field("data/face_seg", description="one folder or a list of folders")
    image_size: list[Count] | None = Field(
        None, description="[width, height] in pixels of every target; without it the aspect ratio is kept"
    )
    resolution: Count | None = Field(
        None, description="side, in pixels, of the square whose area pictures are scaled to; default: the model's own"
    )
    caption_dropout_rate: Rate = Field(0.0, description="share of samples trained on the empty prompt")
    prompt_image_dropout_rate: Rate = Field(0.0, description="share of samples trained without their references")
    use_edit_mask: bool = Field(False, description="read STEM_mask beside the target, for loss.mask_loss")
    center_crop: bool = Field(False, description="keep the centre of every picture of a pair")
    center_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="share of width and height that center_crop keeps"
    )
    random_crop: bool = Field(False, description="a random window, the same for all pictures of a pair")
    crop_size: Count | list[Count] | None = Field(
        None, description="pixels of the random window in the target, a side or [width, height]; default: the largest"
    )
    crop_scale: list[Rate] = Field([1.0, 1.0], description="range of the random window's scale, [smallest, largest]")

    @model_validator(mode="after")
    def _consistent(self) -> DatasetArguments:
        if self.image_size is not None and len(self.image_size) != 2:
            raise ValueError(f"image_size={self.image_size} is not [width, height]")
        if self.image_size is not None and self.resolution is not None:
            raise ValueError(f"image_size={self.image_size} and resolution={self.resolution} exclude each other")
        if self.center_crop and self.random_crop:
            raise ValueError("center_crop and random_crop exclude each other")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale={self.crop_scale} is not [smallest, largest] with 0 < smallest <= largest")
        return self

    @property
    def folders(self) -> tuple[Path, ...]:
        paths = [self.dataset_path] if isinstance(self.dataset_path, str) else self.dataset_path
        return tuple(Path(path).expanduser() for path in paths)


class DataConfig(Section):
    """The pairs, and how they are read."""

    class_path: ClassPath = Field(OUR_DATASETS[0], description="import path of the dataset class")
    init_args: DatasetArguments = Field(DatasetArguments(), description="its arguments")
    batch_size: Count = Field(1, description="samples per process in one forward pass")
    num_workers: Natural = Field(0, description="processes that read data; 0 reads in the training process")
    prefetch_factor: Count = Field(2, description="batches each worker reads ahead")
    persistent_workers: bool = Field(False, description="keep workers alive between passes")
    shuffle: bool = Field(True, description="a new order of the samples every epoch")

    @model_validator(mode="after")
    def _known_arguments(self) -> DataConfig:
        unknown = sorted(self.init_args.model_extra or ())
        if unknown and self.class_path in OUR_DATASETS:
            raise ValueError("; ".join(_unknown(f"init_args.{name}", DataConfig) for name in unknown))
        return self


class TrainConfig(Section):
    """The loop. A step is an optimizer step, everywhere."""

    trainer: str | None = Field(None, description="QwenImageEdit, FluxKontext, ...; default: what the checkpoint says")
    num_epochs: Count | None = Field(None, description="passes over the data; training ends at whichever comes first")
    max_train_steps: Count | None = Field(None, description="optimizer steps; 1000 where num_epochs is not given either")
    gradient_accumulation_steps: Count = Field(1, description="forward passes per optimizer step and process")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field("bf16", description="precision of the forward pass")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm")
    checkpointing_steps: Count = Field(500, description="optimizer steps between checkpoints; one more at the end")
    checkpoints_total_limit: Count | None = Field(None, description="checkpoints kept; the oldest beyond it go")
    resume_from_checkpoint: str | None = Field(
        None, description='a checkpoint folder, or "latest": the newest complete one of this project'
    )
    seed: Natural = Field(42, description="order of the data, noise and initial adapter follow from it")
    sigma_distribution: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="how noise levels are drawn, before the shift"
    )
    sigma_shift: Literal["model"] | Positive = Field(
        "model", description='"model": the checkpoint\'s own resolution-dependent shift; or a constant factor'
    )
    guidance_scale: Positive = Field(1.0, description="value of the guidance embedding, for models that have one")
    low_memory: bool = Field(False, description="load and run part by part")
    vae_encoder_device: Device | None = Field(None, description="where the VAE lives, training without the cache")
    text_encoder_device: Device | None = Field(None, description="the same for the (first) text encoder")
    text_encoder_2_device: Device | None = Field(None, description="the same for the second text encoder")


class OptimizerConfig(Section):
    """The optimizer."""

    class_path: ClassPath = Field("torch.optim.AdamW", description="import path of a torch.optim.Optimizer")
    init_args: dict[str, Any] = Field({"lr": 1e-4}, description="its arguments, as that class names them")


class SchedulerConfig(Section):
    """The learning rate over optimizer steps, as in diffusers."""

    scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant", description="shape of the schedule")
    warmup_steps: Natural = Field(0, description="optimizer steps of linear warm-up")
    num_cycles: Positive | None = Field(None, description="cosine: periods; cosine_with_restarts: restarts")
    power: Positive = Field(1.0, description="exponent of polynomial")


class CacheConfig(Section):
    """Embeddings computed once."""

    use_cache: bool = Field(False, description="train from stored embeddings; missing ones are encoded first")
    cache_dir: str = Field("cache", description="folder of the store")
    vae_encoder_device: Device | None = Field(None, description="where the VAE lives while caching")
    text_encoder_device: Device | None = Field(None, description="the same for the (first) text encoder")
    text_encoder_2_device: Device | None = Field(None, description="the same for the second text encoder")
    prompt_empty_drop_keys: list[str] | None = Field(
        None, description="text embeddings that the dropped prompt replaces; default: all"
    )


TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "none")
Tracker = Literal["tensorboard", "wandb", "swanlab", "trackio", "none"]


class LoggingConfig(Section):
    """Where a run is written and who is told."""

    output_dir: str = Field("output", description="runs go to OUTPUT_DIR/PROJECT/vN")
    logging_dir: str = Field("logs", description="local files of online trackers, inside the version folder")
    report_to: Tracker | list[Tracker] = Field("tensorboard", description="tracker, or a list of them")
    tracker_project_name: str = Field(
        "qwen_image_finetune", description="PROJECT: folder of the versions, and project at the trackers",
        pattern=r"^[\w][\w .-]*$",
    )  # fmt: skip

    @property
    def project_dir(self) -> Path:
        return Path(self.output_dir).expanduser() / self.tracker_project_name

    @property
    def trackers(self) -> tuple[str, ...]:
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return tuple(name for name in names if name != "none")


class ValidationConfig(Section):
    """Samples drawn while training."""

    enabled: bool = Field(False, description="draw samples during training")
    steps: Count = Field(500, description="optimizer steps between rounds of samples")
    num_validation_samples: Count = Field(4, description="pairs drawn, spread over the dataset")
    num_inference_steps: Count | None = Field(None, description="sampler steps; default: the model's own")
    guidance_scale: float | None = Field(None, description="default: the model's own")
    seed: Natural = Field(0, description="noise of the samples")


class LossConfig(Section):
    """The weighting of the loss over the picture."""

    mask_loss: bool = Field(False, description="weight the loss by the edit mask (data.init_args.use_edit_mask)")
    foreground_weight: Annotated[float, Field(ge=0.0)] = Field(2.0, description="weight where the mask is white")
    background_weight: Annotated[float, Field(ge=0.0)] = Field(1.0, description="weight where it is black")


class PredictDevices(Section):
    """Where each part lives at prediction."""

    vae: Device | None = Field(None, description="the VAE")
    text_encoder: Device | None = Field(None, description="the (first) text encoder")
    text_encoder_2: Device | None = Field(None, description="the second text encoder")
    transformer: Device | None = Field(None, description="the transformer")


class PredictConfig(Section):
    """Pictures from a trained model."""

    devices: PredictDevices = Field(PredictDevices(), description="placement; default: the first accelerator, else cpu")


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
        """What the reader of the configuration should be told once: moved, overruled and idle keys."""
        return tuple(self._notes)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.loss.mask_loss and not self.data.init_args.use_edit_mask:
            raise ValueError("loss.mask_loss=true needs data.init_args.use_edit_mask=true, which reads the masks")
        if self.loss.mask_loss and self.loss.foreground_weight == self.loss.background_weight == 0:
            raise ValueError("loss.foreground_weight and loss.background_weight are both 0: nothing would be trained")
        if self.model.quantize and self.model.lora is None:
            raise ValueError(
                f"model.quantize={self.model.quantize!r} with model.lora=null: a quantised base is frozen and cannot "
                "be fully fine-tuned; set model.quantize=false or give model.lora"
            )
        return self

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps after which training ends, if counted in steps."""
        return 1000 if self.train.max_train_steps is None and self.train.num_epochs is None else self.train.max_train_steps


# Older spellings and second homes of a key: (where configurations have it, where it lives). Today's place wins.
SPELLINGS: tuple[tuple[str, str], ...] = (
    ("model.rank", "model.lora.r"),
    ("resume_from_checkpoint", "train.resume_from_checkpoint"),
    *((f"data.init_args.{key}", f"data.{key}")
      for key in ("batch_size", "num_workers", "prefetch_factor", "persistent_workers", "shuffle")),
    *((f"data.{key}", f"data.init_args.{key}") for key in ("caption_dropout_rate", "prompt_image_dropout_rate")),
    ("data.init_args.cache_drop_rate", "data.init_args.caption_dropout_rate"),
    ("data.cache_drop_rate", "data.init_args.caption_dropout_rate"),
    *((f"data.{place}{key}", f"cache.{key}") for place in ("", "init_args.") for key in ("use_cache", "cache_dir")),
    ("validation.validation_steps", "validation.steps"),
    ("loss.forground_weight", "loss.foreground_weight"),
)  # fmt: skip
