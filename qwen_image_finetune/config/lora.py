"""`model.lora` and `model.base_loras`: the adapter that is trained, and LoRAs under it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from qwen_image_finetune.config.tree import shown
from qwen_image_finetune.config.values import (
    Allowed,
    Identifier,
    Initialisation,
    Positive,
    Rank,
    Rate,
    Section,
    Strength,
    Switch,
    Text,
    expression,
    refuse,
)

Share = Annotated[float, Field(ge=0.0, lt=1.0), Allowed("number from 0 to below 1")]
Targets = Annotated[str, Field(min_length=1), Allowed('regular expression or "all-linear"')]
Expression = Annotated[str, Field(min_length=1), Allowed("regular expression")]
Pattern = Annotated[str, Field(min_length=1), Allowed("name, ending or regular expression")]
RankPattern = Annotated[Pattern, expression("model.lora.rank_pattern")]
AlphaPattern = Annotated[Pattern, expression("model.lora.alpha_pattern")]
TAKEN_FROM_THE_BASE = ("pissa", "olora")  # starting points, as their names begin


class LoraConfig(Section):
    """A low-rank adapter, as in peft."""

    r: Rank = Field(16, description="rank of the adapter")
    lora_alpha: Positive = Field(16, description="the update is scaled by lora_alpha / r")
    use_dora: Switch = Field(False, description="DoRA: length and direction of every row of a weight are learnt apart")
    use_rslora: Switch = Field(False, description="rsLoRA: the scale is lora_alpha / sqrt(r)")
    rank_pattern: Annotated[dict[RankPattern, Rank], Allowed("names of modules, each with a rank")] = Field(
        {}, description="modules with another rank, by the end of their name, or by an expression: {to_q: 4}"
    )
    alpha_pattern: Annotated[dict[AlphaPattern, Positive], Allowed("names of modules, each with a number")] = Field(
        {}, description="modules with another lora_alpha, in the same way"
    )
    lora_dropout: Rate = Field(0.0, description="share of adapter inputs zeroed while training")
    rank_dropout: Share = Field(0.0, description="share of the ranks left out, drawn for each sample while training")
    module_dropout: Share = Field(0.0, description="share of the adapter's modules left out of a pass while training")
    max_norm: Positive | None = Field(
        None, description="after every step, the change of a weight is scaled down to this Frobenius norm"
    )
    lr_ratio: Positive = Field(1.0, description="LoRA+: the rate of lora_B is the optimizer's times this")
    init_lora_weights: Switch | Initialisation = Field(True, description="first values; true: B = 0, A Kaiming")
    target_modules: (
        Annotated[list[Text], Field(min_length=1)] | Annotated[Targets, expression("model.lora.target_modules")] | None
    ) = Field(
        None,
        description='endings of module names, or one regular expression over whole names, or "all-linear"; null: '
        "the model's own, which docs/models.md lists",
    )
    exclude_modules: (
        Annotated[list[Text], Field(min_length=1)] | Annotated[Expression, expression("model.lora.exclude_modules")]
    ) | None = Field(
        None, description="of these, the ones to leave alone: endings of names, or one expression over whole names"
    )
    adapter_name: Identifier = Field("default", description="name of the adapter inside the model")
    pretrained_weight: Text | None = Field(None, description="file, folder or hub id of a LoRA to start from")

    @property
    def initialisation(self) -> bool | str:
        """`init_lora_weights`, unless `pretrained_weight` fills the adapter anyway: then peft's plain start."""
        return self.init_lora_weights if self.pretrained_weight is None else True

    @property
    def drops_at_random(self) -> bool:
        """Whether a pass depends on the global random state."""
        return bool(self.lora_dropout or self.rank_dropout or self.module_dropout)

    @model_validator(mode="after")
    def _consistent(self) -> LoraConfig:
        start, problems = str(self.initialisation), []
        if self.use_dora and start.startswith(TAKEN_FROM_THE_BASE):
            problems.append(
                f"model.lora.use_dora=true and model.lora.init_lora_weights={shown(start)} exclude each other: DoRA "
                'takes the lengths of rows from the base as it is; use true or "gaussian"'
            )
        refuse(problems)
        return self


class BaseLora(Section):
    """A LoRA under the training."""

    file: Text = Field(description="file, folder or hub id of the LoRA, in any dialect")
    strength: Strength = Field(1.0, description="factor of its change; 1 is as its file says")
