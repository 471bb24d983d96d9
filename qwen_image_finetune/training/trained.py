"""What training changes, the adapter or the whole transformer: copied, saved for its users, and taken back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.config import Config, ConfigError, ModelConfig
from qwen_image_finetune.disk.checkpoint import CheckpointError
from qwen_image_finetune.disk.files import Staged
from qwen_image_finetune.disk.versions import LORA_WEIGHTS
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora import files as lora_files
from qwen_image_finetune.lora.kinds import KINDS
from qwen_image_finetune.lora.names import Naming
from qwen_image_finetune.lora.sources import TRANSFORMER, find_lora

ADAPTER = "adapter.safetensors"  # for an exact resume; LORA_WEIGHTS beside it is the file for users
REMAINDER = "remainder.safetensors"  # for an exact resume: what the float32 weights have beyond those in TRANSFORMER

AVERAGE = "ema"  # folder, in a checkpoint, of the moving average: the same files as of the weights


def weights(transformer: ModelMixin, config: ModelConfig) -> dict[str, Tensor]:
    """Everything that training changes; the tensors are the model's own."""
    if config.lora is None:
        return transformer.state_dict()
    return adapters.trainable_state(transformer, config.lora.adapter_name)


def other_rate(transformer: ModelMixin, config: ModelConfig) -> tuple[list[Tensor], float]:
    """Weights that learn at another rate, and how many times that of the others it is: LoRA+
    (https://arxiv.org/abs/2402.12354) is B's."""
    if config.lora is None or config.lora.lr_ratio == 1.0:
        return [], 1.0
    return adapters.second_factors(transformer, config.lora.adapter_name), config.lora.lr_ratio


def save(
    folder: Staged, transformer: ModelMixin, state: dict[str, Tensor], config: Config, about: Mapping[str, str]
) -> None:
    """Write a LoRA file that opens everywhere, or a transformer folder that `from_pretrained` loads.

    Args:
        state: copies of the `weights` on the CPU. Those of a whole transformer are used up: it may fill the host.
        transformer: gives the configuration and the layout of the adapter; its weights are not read.
        about: what the file says about itself.
    """
    if config.model.lora is not None:
        save_file(state, folder / ADAPTER)
        lora_files.save_lora(folder / LORA_WEIGHTS, transformer, config.model.lora, about, state)
        return
    if config.train.save_precision == "bf16":
        remainder = {}
        for name in [name for name, weight in state.items() if weight.dtype == torch.float32]:
            state[name], remainder[name] = halves(state.pop(name))
        if remainder:  # of weights that are trained in bfloat16 there is none
            save_file(remainder, folder / REMAINDER)
    transformer.save_config(folder / TRANSFORMER)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(state, folder / TRANSFORMER, filename_pattern=pattern, metadata={"format": "pt"})


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the nearest bfloat16 (of two equally near, the larger one), and what is left, in int16.

    bfloat16 is the upper half of float32's bits. `joined` gives every bit back, and both together take no more room.
    """
    bits = weight.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def joined(upper: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor whose `halves` these are."""
    return ((upper.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


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
    restore(weights(transformer, config), exact(folder))


def exact(folder: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint as they were when it was saved, to the last bit."""
    if (folder / ADAPTER).is_file():
        return load_file(folder / ADAPTER)
    saved = {
        name: value for file in (folder / TRANSFORMER).glob("*.safetensors") for name, value in load_file(file).items()
    }
    if (folder / REMAINDER).is_file():
        saved |= {name: joined(saved[name], rest) for name, rest in load_file(folder / REMAINDER).items()}
    return saved


def ranks(folder: Path) -> dict[str, int]:
    """Rank of each module of the adapter in a checkpoint, from the header of its file.

    Raises:
        CheckpointError: the file is no such file.
    """
    endings = tuple(f".{kind.rank_of}" for kind in KINDS.values() if kind.rank_of is not None)
    try:
        with safe_open(folder / ADAPTER, framework="np") as file:
            names = [name for name in file.keys() if name.endswith(endings)]  # noqa: SIM118 (not a mapping)
            return {
                name.removesuffix(ending): file.get_slice(name).get_shape()[0]
                for name in names
                for ending in endings
                if name.endswith(ending)
            }
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: its weights cannot be read: {error}") from error


def start_from(source: str, transformer: ModelMixin, naming: Naming, config: ModelConfig) -> None:
    """Fill the adapter from a LoRA, which changes the weights alike. One of our own checkpoints, trained with the same
    alpha, comes back bit for bit: in the file for users its scale is multiplied into the factors.

    Raises:
        LoraFileError, ConfigError: see `load_lora`.
    """
    assert config.lora is not None
    lora_files.load_lora(transformer, source, naming, config.lora)
    beside = find_lora(source).with_name(ADAPTER)
    if not beside.is_file():
        return
    own, saved = weights(transformer, config), load_file(beside)
    if own.keys() == saved.keys() and all(_rounded_alike(saved[name], weight) for name, weight in own.items()):
        restore(own, saved)


def _rounded_alike(saved: Tensor, weight: Tensor) -> bool:
    return saved.shape == weight.shape and torch.allclose(saved.to(weight.device), weight, rtol=1e-6, atol=0.0)


def restore(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy `saved` into the weights of a model, cut like them where processes share it; bit for bit.

    Raises:
        ConfigError: names or shapes differ.
    """
    check_fit(weights, saved)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(parallel.cut_like(saved[name], weight))


def check_fit(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raises ConfigError where names or shapes differ."""
    missing, unknown = sorted(weights.keys() - saved.keys()), sorted(saved.keys() - weights.keys())
    if missing or unknown:
        raise ConfigError(
            f"the saved weights do not fit: {len(missing)} are missing {missing[:3]}, {len(unknown)} are unknown "
            f"{unknown[:3]}; resume with the model section that they were saved with"
        )
    for name, weight in weights.items():
        if weight.shape != saved[name].shape:
            raise ConfigError(
                f"the saved weights do not fit: {name} is {tuple(saved[name].shape)}, not {tuple(weight.shape)}"
            )
