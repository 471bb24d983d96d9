"""What is trained: the section `model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qwen_image_finetune.config.lora import BaseLora, LoraConfig
from qwen_image_finetune.config.values import (
    Allowed,
    Section,
    Switch,
    Text,
)


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
