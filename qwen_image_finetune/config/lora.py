"""`model.lora` and `model.base_loras`: the adapter that is trained, and LoRAs under it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwen_image_finetune.config.tree import shown
from qwen_image_finetune.config.values import (
    Allowed,
    Count,
    Identifier,
    Initialisation,
    Positive,
    Rank,
    Rate,
    Section,
    Side,
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
TITLES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "oft": "OFT"}
# Keys that only some kinds of adapters have, and why others have not.
ONLY: dict[str, tuple[tuple[str, ...], str]] = {
    "use_dora": (("lora",), "DoRA gives the rows of a LoRA their lengths"),
    "use_rslora": (("lora",), "rsLoRA is another scale of a LoRA; set model.lora.lora_alpha"),
    "lr_ratio": (("lora",), "LoRA+ is about the second factor of a LoRA"),
    "init_lora_weights": (("lora",), "it starts as peft starts it, changing nothing"),
    "lora_dropout": (("lora",), "it has no factor that inputs go through first; use model.lora.rank_dropout"),
    "rank_dropout": (("lora", "lokr", "loha"), "a rotation has no ranks; use model.lora.module_dropout"),
    "max_norm": (("lora", "lokr", "loha"), "a rotation leaves the lengths of rows as they are"),
    "rank_pattern": (("lora", "lokr", "loha"), "an OFT has no rank"),
    "alpha_pattern": (("lora", "lokr", "loha"), "an OFT has no scale"),
    "decompose_factor": (("lokr",), "it divides the matrices of a LoKr"),
    "oft_block_size": (("oft",), "it is of the blocks of an OFT"),
}
TAKEN_FROM_THE_BASE = ("pissa", "olora")  # starting points, as their names begin


class LoraConfig(Section):
    """A low-rank adapter, as in peft."""

    type: Literal["lora", "lokr", "loha", "oft"] = Field(
        "lora", description="kind of adapter (docs/adapters.md): LoRA, LoKr, LoHa or OFT"
    )
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
    decompose_factor: Literal[-1] | Count = Field(
        -1, description="LoKr: outputs and inputs are divided by this for the first matrix; -1: near their roots"
    )
    oft_block_size: Side = Field(32, description="OFT: inputs that are turned together; a divisor of all targets'")
    adapter_name: Identifier = Field("default", description="name of the adapter inside the model")
    pretrained_weight: Text | None = Field(None, description="file, folder or hub id of a LoRA to start from")

    @property
    def initialisation(self) -> bool | str:
        """`init_lora_weights`, unless `pretrained_weight` fills the adapter anyway: then peft's plain start."""
        return self.init_lora_weights if self.pretrained_weight is None else True

    @property
    def words(self) -> str:
        """What is trained: 'a LoRA of rank 16, alpha 16'."""
        title = "DoRA" if self.use_dora else TITLES[self.type]
        if self.type == "oft":
            return f"an {title} in blocks of {self.oft_block_size}"
        return f"a {title} of rank {self.r}, alpha {self.lora_alpha:g}"

    def _of_another_kind(self) -> list[str]:
        """Keys that this kind of adapter has not."""
        defaults = {name: field.default for name, field in LoraConfig.model_fields.items()}
        return [
            f"model.lora.{key}={shown(getattr(self, key))} and model.lora.type={self.type} exclude each other: {why}"
            for key, (kinds, why) in ONLY.items()
            if self.type not in kinds and getattr(self, key) != defaults[key]
        ]

    @property
    def drops_at_random(self) -> bool:
        """Whether a pass depends on the global random state."""
        return bool(self.lora_dropout or self.rank_dropout or self.module_dropout)

    @model_validator(mode="after")
    def _consistent(self) -> LoraConfig:
        start, problems = str(self.initialisation), self._of_another_kind()
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
