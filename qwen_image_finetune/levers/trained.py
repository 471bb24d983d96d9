"""What training changes, the adapter or the whole transformer: copied, saved for its users, and taken back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusers import ModelMixin
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.config import ConfigError, ModelConfig
from qwen_image_finetune.levers import adapters, lora_files, parallel
from qwen_image_finetune.runs import LORA_WEIGHTS, checkpoint_folders

TRANSFORMER = "transformer"  # folder of a fully tuned transformer, in diffusers layout
ADAPTER = "adapter.safetensors"  # for an exact resume; LORA_WEIGHTS beside it is the file for users


def snapshot(transformer: ModelMixin, config: ModelConfig, keep: bool = True) -> dict[str, Tensor]:
    """Copies on the CPU of everything that training changes.

    Args:
        keep: False where another process keeps them: this one only gives its part of a model that is shared.
    """
    if config.lora is None:
        state = transformer.state_dict()
    else:
        state = adapters.trainable_state(transformer, config.lora.adapter_name)
    whole = parallel.gathered(state, keep)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in whole.items() if tensor is not None}


def find_tuned(source: str | Path) -> Path | None:
    """The checkpoint with a fully tuned transformer that a folder is, or the newest one of a version folder."""
    path = Path(source).expanduser()
    found = [path, *reversed(checkpoint_folders(path))]
    return next((folder for folder in found if (folder / TRANSFORMER / "config.json").is_file()), None)


def save(
    folder: Path, transformer: ModelMixin, state: dict[str, Tensor], config: ModelConfig, about: Mapping[str, str]
) -> None:
    """Write a snapshot: a LoRA file that opens everywhere, or a transformer folder that `from_pretrained` loads.

    Args:
        transformer: gives the configuration and the layout of the adapter; its weights are not read.
        about: what the file says about itself.
    """
    if config.lora is not None:
        save_file(state, folder / ADAPTER)
        lora_files.save_lora(folder / LORA_WEIGHTS, transformer, config.lora, about, state)
        return
    transformer.save_config(folder / TRANSFORMER)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(state, folder / TRANSFORMER, filename_pattern=pattern, metadata={"format": "pt"})


def check_kind(folder: Path, config: ModelConfig) -> None:
    """Raises ConfigError where a checkpoint holds a LoRA and all weights are to be trained, or the other way round."""
    if config.lora is not None and not (folder / ADAPTER).is_file():
        raise ConfigError(f"{folder} is a checkpoint of full fine-tuning, but model.lora asks for an adapter")
    if config.lora is None and not (folder / TRANSFORMER).is_dir():
        raise ConfigError(f"{folder} is a checkpoint of a LoRA, but model.lora=null asks for full fine-tuning")


def load(folder: Path, transformer: ModelMixin, config: ModelConfig) -> None:
    """Take back what `save` wrote, bit for bit, from a folder of the right kind.

    Raises:
        ConfigError: the folder holds other weights, or other shapes.
    """
    if config.lora is not None:
        weights = adapters.trainable_state(transformer, config.lora.adapter_name)
        adapters.restore(weights, load_file(folder / ADAPTER))
        return
    shards = sorted((folder / TRANSFORMER).glob("*.safetensors"))
    adapters.restore(
        transformer.state_dict(), {name: value for shard in shards for name, value in load_file(shard).items()}
    )
