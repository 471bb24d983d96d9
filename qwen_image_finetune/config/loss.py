"""What counts as an error, and what a model should go on answering: the section `loss`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwen_image_finetune.config.data import DatasetPath
from qwen_image_finetune.config.values import (
    Allowed,
    NotNegative,
    Positive,
    Rate,
    Section,
    Switch,
    Text,
)


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
