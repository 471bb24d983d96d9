"""The parts that prediction needs, loaded onto their devices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config, resolve_family
from qwen_image_finetune.drawing.predict import Predictor
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.levers.attention import use_attention
from qwen_image_finetune.levers.stored_precision import check_installed
from qwen_image_finetune.lora.reading import read_fitting
from qwen_image_finetune.machine import console, launch
from qwen_image_finetune.machine.accelerator import resolve_device

if TYPE_CHECKING:
    from diffusers import ModelMixin

ROOM_TO_DRAW = 6 * 2**30  # bytes: a picture on its way, and the VAE's share of it


def build_predictor(config: Config, tuned: Path | None = None) -> Predictor:
    """Everything prediction needs, on the devices of predict.devices (default: the first accelerator, else the CPU).

    With train.low_memory, encoders that find no room beside the transformer on its card wait in host memory and take
    turns with it.

    Args:
        tuned: the folder of a transformer to draw with in place of the base's.
    """
    family = get_family(resolve_family(config, download=True)[0])
    folder = loading.checkpoint_folder(config, family)
    check_installed(config.model, folder)
    if tuned is None and (config.model.transformer_file is not None or config.model.base_loras):
        loading.check_base(family, folder, config.model)  # before the encoders load
    home = resolve_device(None, "predict.devices")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > 1 and home.type != "cpu":  # each process draws for itself, on its own card
        home = torch.device(home.type, int(os.environ["LOCAL_RANK"]))
    homes = {"default": home}
    for name, device in config.predict.devices.model_dump().items():
        key = f"predict.devices.{name}"
        homes[name] = resolve_device(launch.encoder_device(device, key, str(home), local), key)
    card = homes["transformer"]
    waiting = config.train.low_memory and card.type != "cpu"
    turns = [name for name in ("text_encoder", "text_encoder_2")
             if waiting and name in family.text_components and homes[name] == card]  # fmt: skip
    dtype = loading.encoder_dtype(config.train.mixed_precision)
    pipe = loading.load_encoders(
        family, folder, dtype, homes | dict.fromkeys(turns, torch.device("cpu")),
        text_format=config.model.text_format,
    )  # fmt: skip
    transformer = load_for_prediction(config, family, tuned or folder, card, tuned is not None)
    if turns and fits_beside([pipe.components[name] for name in turns], card):
        for name in turns:
            pipe.components[name].to(card)
        turns = []
    scheduler, dtype = loading.load_scheduler(folder), loading.weight_dtype(config.train.mixed_precision)
    return Predictor(family, pipe, transformer, scheduler, config.data.init_args.area, dtype, turns)


def fits_beside(encoders: Sequence[torch.nn.Module], card: torch.device) -> bool:
    """Whether a card has room for these beside what it holds, and ROOM_TO_DRAW; only CUDA says how much is free."""
    weights = sum(tensor.nbytes for encoder in encoders for tensor in encoder.parameters())
    return card.type == "cuda" and torch.cuda.mem_get_info(card)[0] >= weights + ROOM_TO_DRAW


def load_for_prediction(config: Config, family: Family, folder: Path, device: torch.device, tuned: bool) -> ModelMixin:
    """The transformer of a checkpoint as prediction has it: at rest, with an attention that runs here.

    Args:
        tuned: the folder is of a transformer that was tuned as a whole, not of the base.
    """
    dtype = loading.weight_dtype(config.train.mixed_precision)
    model = config.model.of_a_tuned_transformer() if tuned else config.model
    transformer = loading.load_transformer(family, folder, dtype, model, device, say=console.say)
    transformer.eval().to(device)
    use_attention(transformer, "auto", config.train.mixed_precision)  # what training used may not run here
    return transformer


def check_loras(config: Config, loras: Sequence[Path]) -> None:
    """Refuse LoRAs that do not fit the model, before the model loads.

    Raises:
        LoraFileError: names what does not fit.
    """
    if not loras:
        return
    family = get_family(resolve_family(config, download=True)[0])
    folder = loading.checkpoint_folder(config, family)
    skeleton = loading.empty_transformer(family, folder, loading.weight_dtype(config.train.mixed_precision))
    for lora in loras:
        read_fitting(skeleton, lora, family.naming)
