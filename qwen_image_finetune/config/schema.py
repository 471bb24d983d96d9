"""Every knob but those of the data: one frozen model a section, one line of meaning a key.

The reference in docs/configuration.md is generated from these declarations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from qwen_image_finetune.config.data import DatasetPath
from qwen_image_finetune.config.lora import BaseLora, LoraConfig
from qwen_image_finetune.config.tree import shown
from qwen_image_finetune.config.values import (
    Allowed,
    ClassPath,
    Count,
    Device,
    FolderName,
    Natural,
    NotNegative,
    Number,
    Positive,
    Rate,
    Seconds,
    Section,
    Seed,
    Shift,
    Switch,
    Text,
)


def _no_is_a_word(value: Any) -> Any:
    """YAML reads an unquoted no as false."""
    return "no" if value is False else value


def _null_is_none(value: Any) -> Any:
    """YAML's null where a tracker is expected means none of them."""
    return "none" if value is None else value


def _one_way(value: Any) -> Any:
    """Refuse formats whose weights can be multiplied in one direction alone."""
    if value in ("mxfp8", "nvfp4"):
        raise ValueError(
            f"model.quantize={value!r} cannot be trained on: its weights have a scale for each block of a row, and "
            "cards multiply them along the row alone; the gradient of the input sums over rows, so it would need a "
            "second copy of every weight. Use fp8 or int8 (docs/precision.md)"
        )
    return value


class ModelConfig(Section):
    """What is trained."""

    pretrained_model_name_or_path: Text = Field(description="hub id or folder in diffusers layout")
    revision: Text | None = Field(None, description="branch, tag or commit of a hub id")
    transformer_file: Text | None = Field(
        None,
        description="one .safetensors or .gguf with the transformer; everything else comes from "
        "pretrained_model_name_or_path",
    )
    base_loras: Annotated[list[BaseLora], Allowed("list of sections: file, strength")] = Field(
        [], description="LoRAs that are merged into the frozen base before anything else"
    )
    quantize: Annotated[Switch | Literal["fp8", "nf4", "fp4", "int8", "auto"], BeforeValidator(_one_way)] = Field(
        False,
        description='quantise the frozen base while loading; true means fp8; "auto": chosen for the card, and said why',
    )
    quantize_text_encoders: Switch | Literal["fp8", "int8"] = Field(
        False, description="store the weights of the text encoders' blocks in 8 bits; true means int8"
    )
    vae_tiling: Switch = Field(
        False, description="encode pictures above 2 megapixels in tiles: less memory, latents that differ a little"
    )
    lora: LoraConfig | None = Field(
        LoraConfig(), description="the adapter; null, written out, trains the whole transformer"
    )

    @property
    def asked_format(self) -> str | None:
        """The format that `quantize` asks for by its name; None: as the checkpoint is, or "auto", not decided yet."""
        if self.quantize == "auto":
            return None
        return "fp8" if self.quantize is True else self.quantize or None

    @property
    def text_format(self) -> str | None:
        """The format that `quantize_text_encoders` asks for by its name."""
        return "int8" if self.quantize_text_encoders is True else self.quantize_text_encoders or None

    @property
    def loras(self) -> list[tuple[str, str]]:
        """The LoRAs that a run reads, each with the key that names it."""
        under = [(f"model.base_loras[{place}].file", one.file) for place, one in enumerate(self.base_loras)]
        start = None if self.lora is None else self.lora.pretrained_weight
        return under if start is None else [("model.lora.pretrained_weight", start), *under]

    @property
    def transformer_path(self) -> Path | None:
        """`transformer_file` as a path."""
        return None if self.transformer_file is None else Path(self.transformer_file).expanduser()

    def of_a_tuned_transformer(self) -> ModelConfig:
        """The same for a transformer that was tuned as a whole, which has its base and what was merged in it."""
        return self.model_copy(update={"transformer_file": None, "base_loras": []})


class EmaConfig(Section):
    """A moving average of the trained weights, validated and saved beside them."""

    enabled: Switch = Field(False, description="keep one")
    decay: Annotated[float, Field(ge=0.0, lt=1.0), Allowed("number from 0 to below 1")] = Field(
        0.999, description="share of the average that stays in a step; less in the first updates"
    )
    start_step: Natural = Field(0, description="optimizer steps before the first weights are taken in")
    every: Count = Field(1, description="optimizer steps between updates")
    device: Literal["cpu"] | None = Field(None, description="cpu: it waits in host memory; default: beside the weights")


class TrainConfig(Section):
    """The loop. A step is an optimizer step, everywhere."""

    trainer: Text | None = Field(None, description="QwenImageEdit, FluxKontext, ...; default: what the checkpoint says")
    num_epochs: Count | None = Field(None, description="passes over the data; training ends at whichever comes first")
    max_train_steps: Count | None = Field(
        None, description="optimizer steps; 1000 where num_epochs is not given either"
    )
    gradient_accumulation_steps: Count = Field(1, description="forward passes per optimizer step and process")
    gradient_checkpointing: Switch = Field(False, description="recompute activations in the backward pass")
    keep_activations: Literal["none", "auto"] | Rate = Field(
        0.0,
        description="what recomputation spares: attention outputs and this share of those of the other products, most "
        'time for its memory first; "none": nothing; "auto": as much as the card has room for',
    )
    offload_activations: Switch = Field(False, description="activations wait for the backward pass in host memory")
    blocks_to_swap: Natural | Literal["auto"] = Field(
        0,
        description="blocks whose frozen weights wait in host memory and visit the card when they are needed; "
        '"auto": as few as the card allows',
    )
    release_gradients: Switch = Field(
        False, description="full fine-tuning: each weight is updated, its gradient freed, as soon as that is known"
    )
    compile: Switch | Literal["auto"] = Field(
        False,
        description='compile the blocks, once for each size of batch and pictures; "auto": where the run gains by it',
    )
    memory: Literal["as_written", "auto"] = Field(
        "as_written",
        description='"auto": gradient_checkpointing, keep_activations, offload_activations and blocks_to_swap are '
        "chosen, the fastest that fits the card",
    )
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_no_is_a_word)] = Field(
        "bf16", description="precision of the forward pass"
    )
    weight_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="full fine-tuning: of the weights while they are trained; bf16 takes half the memory, and rounds "
        "each step up or down by chance, right in the mean",
    )
    max_grad_norm: Positive | None = Field(1.0, description="gradients are clipped to this norm; null: they are not")
    checkpointing_steps: Count = Field(500, description="optimizer steps between checkpoints; one more at the end")
    checkpoints_total_limit: Count | None = Field(None, description="checkpoints kept; the oldest beyond it go")
    save_precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="full fine-tuning: of the transformer in a checkpoint, as it is used; what float32 has beyond "
        "bf16 lies beside it, so that a resume is exact",
    )
    resume_from_checkpoint: Text | None = Field(
        None, description='a checkpoint folder, or "latest": the newest complete one of this project'
    )
    seed: Seed = Field(42, description="order of the data, noise and initial adapter follow from it")
    sigma_distribution: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="how noise levels are drawn, before the shift"
    )
    sigma_shift: Literal["model"] | Shift = Field(
        "model", description='"model": the checkpoint\'s own resolution-dependent shift; or a constant factor'
    )
    sigma_stratified: Switch = Field(
        False, description="noise levels of a step spread evenly: of n samples, each gets one in another n-th of them"
    )
    guidance_scale: Positive = Field(1.0, description="value of the guidance embedding, for models that have one")
    attention: Literal["auto", "flash4", "flash", "efficient", "math"] = Field(
        "auto", description="which attention runs (docs/attention.md); auto: the fastest on this machine"
    )
    low_memory: Switch = Field(
        False,
        description="blocks wait in host memory where the card is too small, encoders there while they are not needed; "
        "false with FSDP",
    )
    collective_timeout: Seconds | None = Field(
        None,
        description="seconds that processes wait for one that hangs, from the second step on, before the run ends; "
        "default: 20, or 1800 with train.compile or without the cache",
    )
    ema: EmaConfig = Field(EmaConfig(), description="a moving average of what is trained")
    vae_encoder_device: Device | None = Field(None, description="where the VAE lives, training without the cache")
    text_encoder_device: Device | None = Field(None, description="the same for the (first) text encoder")
    text_encoder_2_device: Device | None = Field(None, description="the same for the second text encoder")

    @property
    def recomputation_keeps(self) -> float | Literal["none"] | None:
        """keep_activations, where "auto" that nothing has decided counts as 0; None without recomputation."""
        if not self.gradient_checkpointing:
            return None
        return 0.0 if self.keep_activations == "auto" else self.keep_activations


class OptimizerConfig(Section):
    """The optimizer."""

    class_path: ClassPath = Field("torch.optim.AdamW", description="import path of a torch.optim.Optimizer")
    init_args: dict[str, Any] = Field(
        default_factory=lambda known: {"lr": 1e-4} if known.get("class_path") == OptimizerConfig.DEFAULT else {},
        description="its arguments, as that class names them; without this key, another class keeps its own defaults",
    )

    DEFAULT: ClassVar[str] = "torch.optim.AdamW"

    @property
    def finds_its_own_rate(self) -> bool:
        """Whether it is, by its name, Prodigy or of D-Adaptation, which multiply the rate they find by lr."""
        name = self.class_path.rpartition(".")[2].lower()
        return "prodigy" in name or name.startswith("dadapt")


class SchedulerConfig(Section):
    """The learning rate over optimizer steps, as in diffusers."""

    scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant", description="shape of the schedule")
    warmup_steps: Natural = Field(0, description="optimizer steps of linear warm-up")
    num_cycles: Positive | None = Field(
        None, description="cosine: periods, default 0.5 (down once); cosine_with_restarts: whole descents, default 1"
    )
    power: Positive = Field(1.0, description="exponent of polynomial")

    @model_validator(mode="after")
    def _consistent(self) -> SchedulerConfig:
        if self.scheduler_type == "cosine_with_restarts" and not float(self.num_cycles or 1).is_integer():
            raise ValueError(
                f"lr_scheduler.num_cycles={self.num_cycles} is refused; allowed with cosine_with_restarts: whole "
                "number from 1 (cosine takes fractions)"
            )
        return self


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


class PreservationConfig(Section):
    """A second loss term, which keeps what the model answers to other prompts."""

    weight: NotNegative = Field(0.0, description="of the second term; 0 is none, and costs nothing")
    prompts: Annotated[list[Text], Field(min_length=1), Allowed("list of one text or more")] = Field(
        ["keep it as it is"],
        description="sentences that are not the edit; the model answers them about the same pictures as before",
    )
    dataset_path: DatasetPath | None = Field(
        None,
        description="pairs that are not the edit, in place of `prompts`, named like data.init_args.dataset_path: the "
        "model answers their prompts about their pictures as before",
    )

    @property
    def asked(self) -> tuple[str, ...]:
        """The prompts, each once; none where the term does not count, or has pairs of its own."""
        return tuple(dict.fromkeys(self.prompts)) if self.weight > 0 and self.dataset_path is None else ()


class LossConfig(Section):
    """What counts: how an error is measured, at which noise levels, and where in the picture."""

    type: Literal["mse", "huber", "pseudo_huber", "l1"] = Field(
        "mse", description="of an error; the two in the middle are the square where it is small, and a line beyond"
    )
    huber_delta: Positive = Field(0.1, description="error where huber and pseudo_huber go from square to line")
    huber_schedule: Literal["constant", "exponential"] = Field(
        "constant", description="exponential: huber_delta to the power of the noise level, so 1 without noise"
    )
    weighting: Literal["none", "sigma_sqrt", "cosmap", "min_snr"] = Field(
        "none", description="of noise levels s: s^-2, 2 / (pi (1 - 2 s + 2 s^2)), or min(SNR, 5) / (SNR + 1)"
    )
    sigma_range: Annotated[list[Rate], Field(min_length=2, max_length=2), Allowed("[least, most]")] = Field(
        [0.0, 1.0], description="[least, most] noise level that is trained at, after the shift"
    )
    mask_loss: Switch | Literal["difference"] = Field(
        False,
        description="weight the loss by the edit mask (data.init_args.use_edit_mask); difference: by where source and "
        "target differ, without a mask",
    )
    foreground_weight: NotNegative = Field(2.0, description="weight where the mask is white, or the pair differs")
    background_weight: NotNegative = Field(1.0, description="weight everywhere else")
    preservation: PreservationConfig = Field(
        PreservationConfig(), description="a second term: the model's own answers to other prompts"
    )

    @property
    def preserves(self) -> bool:
        """Whether the second term counts."""
        return self.preservation.weight > 0

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if self.sigma_range[0] >= self.sigma_range[1]:
            raise ValueError(f"loss.sigma_range={self.sigma_range} is not [least, most] with least below most")
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
