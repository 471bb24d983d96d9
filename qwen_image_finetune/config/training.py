"""The loop: the sections `train`, `ema`, `optimizer` and `lr_scheduler`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from qwen_image_finetune.config.values import (
    Allowed,
    ClassPath,
    Count,
    Device,
    Natural,
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
