"""What caching, training and prediction set up in the same way: data, batches, devices."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen_image_finetune import loading
from qwen_image_finetune.config import (
    OUR_DATASETS,
    CacheConfig,
    Config,
    ConfigError,
    TrainConfig,
    import_class,
    resolve_family,
)
from qwen_image_finetune.data.batches import Batches
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.drawing.predict import Predictor
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.levers.attention import use_attention
from qwen_image_finetune.lora import files as lora_files
from qwen_image_finetune.machine import console, launch, processes
from qwen_image_finetune.machine.processes import Team

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ModelMixin

Say = Callable[[str], None]
ROOM_TO_DRAW = 6 * 2**30  # bytes: a picture on its way, and the VAE's share of it


def build_accelerator(config: Config) -> Accelerator:
    """Devices and processes, as `accelerate launch` or torchrun started them.

    Raises:
        ConfigError: fp16 without an accelerator; sharding that cannot be done.
        LaunchError: fewer processes take part than were asked for, or more than there are cards.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    if config.train.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("train.mixed_precision='fp16' needs a GPU; this machine has none: use 'bf16' or 'no'")
    sharding = parallel.requested()  # before accelerate sees the request
    launched = dict(os.environ)
    if os.environ.get("WORLD_SIZE") == "1":
        # A launcher started one process: DDP around it would copy gradients and refuse weights that wait on the host.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    launch.check_cards(os.environ, torch.accelerator.device_count())
    # Without a card accelerate joins processes only if told that the CPU is meant; else each would train for itself.
    on_cpu = not torch.accelerator.is_available()
    # accelerate remembers the first precision of a process and refuses another; two runs in one process are legal here.
    AcceleratorState._reset_state()
    group = InitProcessGroupKwargs(init_method=processes.fresh_start(), timeout=processes.START_TIMEOUT)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=config.train.mixed_precision, kwargs_handlers=[group])
    launch.check_start(accelerator.num_processes, launched)
    atexit.unregister(processes.leave)
    atexit.register(processes.leave)
    processes.set_timeout(processes.START_TIMEOUT)  # a former run of this process set a shorter one
    parallel.check(sharding, config, accelerator.num_processes)
    if config.cache.use_cache:
        encoder_homes(config.cache, "cache", accelerator.device, build_team(accelerator))
    else:
        encoder_homes(config.train, "train", accelerator.device, build_team(accelerator))
    return accelerator


def build_team(accelerator: Accelerator) -> Team:
    """The processes of this run, to wait for each other without collectives."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return Team(accelerator.process_index, accelerator.num_processes, local)


def encoder_homes(
    part: CacheConfig | TrainConfig, section: str, home: torch.device, team: Team
) -> dict[str, torch.device]:
    """Where the encoders of this process live, by component; `home` unless the configuration says otherwise.

    Raises:
        ConfigError: a device that is not there.
        LaunchError: a numbered device, and several processes on this machine.
    """

    def place(name: str | None, key: str) -> torch.device:
        chosen = launch.encoder_device(name, f"{section}.{key}", str(home), team.local_size)
        return home if chosen == str(home) else loading.resolve_device(chosen, f"{section}.{key}")

    return {
        "default": home,
        "vae": place(part.vae_encoder_device, "vae_encoder_device"),
        "text_encoder": place(part.text_encoder_device, "text_encoder_device"),
        "text_encoder_2": place(part.text_encoder_2_device, "text_encoder_2_device"),
    }


def open_dataset(config: Config, family: Family, decode: bool = False) -> ImageDataset:
    """The dataset of a configuration, checked: every missing or unreadable file in one report.

    Args:
        decode: read every picture to its end, not its header alone.

    Raises:
        DataError: with all problems, before any model is loaded.
    """
    chosen: Any = ImageDataset
    if config.data.class_path not in OUR_DATASETS:
        chosen = import_class(config.data.class_path, "data.class_path", ImageDataset)
    arguments = config.data.init_args
    dataset: ImageDataset = chosen(
        arguments, family.size, family.side_multiple, family.max_references, config.train.seed
    )
    problems = dataset.check(decode)
    if problems and not decode:  # nothing will be trained now: report what lies behind the headers as well
        problems = dataset.check(decode=True)
    if problems:
        raise DataError(problems)
    for line in dataset.notes:
        console.note(line)
    return dataset


def plan_batches(config: Config, dataset: ImageDataset, processes: int) -> Batches:
    """The order of the samples over all processes."""
    arguments = config.data.init_args
    everything = range(len(dataset))
    return Batches(
        [dataset.geometry(index) for index in everything],
        [dataset.geometry(index, with_references=False) for index in everything],
        batch_size=config.data.batch_size,
        micro_batches_per_step=config.train.gradient_accumulation_steps * processes,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        caption_dropout_rate=arguments.caption_dropout_rate,
        reference_dropout_rate=arguments.prompt_image_dropout_rate,
    )


def check_drop_keys(config: Config, family: Family) -> None:
    """Raises ConfigError where cache.prompt_empty_drop_keys names no text embedding of the family."""
    given = config.cache.prompt_empty_drop_keys or []
    unknown = [name for name in given if name not in family.text_embeddings]
    if unknown:
        raise ConfigError(
            f"cache.prompt_empty_drop_keys={given}: {family.name} has no text embedding {unknown}; "
            f"it has {list(family.text_embeddings)}"
        )


def build_predictor(config: Config, tuned: Path | None = None) -> Predictor:
    """Everything prediction needs, on the devices of predict.devices (default: the first accelerator, else the CPU).

    With train.low_memory, encoders that find no room beside the transformer on its card wait in host memory and take
    turns with it.

    Args:
        tuned: the folder of a transformer to draw with in place of the base's.
    """
    family = get_family(resolve_family(config, download=True)[0])
    folder = loading.checkpoint_folder(config, family)
    home = loading.resolve_device(None, "predict.devices")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > 1 and home.type != "cpu":  # each process draws for itself, on its own card
        home = torch.device(home.type, int(os.environ["LOCAL_RANK"]))
    homes = {"default": home}
    for name, device in config.predict.devices.model_dump().items():
        key = f"predict.devices.{name}"
        homes[name] = loading.resolve_device(launch.encoder_device(device, key, str(home), local), key)
    card = homes["transformer"]
    waiting = config.train.low_memory and card.type != "cpu"
    turns = [name for name in ("text_encoder", "text_encoder_2")
             if waiting and name in family.text_components and homes[name] == card]  # fmt: skip
    dtype = loading.encoder_dtype(config.train.mixed_precision)
    pipe = loading.load_encoders(family, folder, dtype, homes | dict.fromkeys(turns, torch.device("cpu")))
    transformer = load_for_prediction(config, family, tuned or folder, card)
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


def load_for_prediction(config: Config, family: Family, folder: Path, device: torch.device) -> ModelMixin:
    """The transformer of a checkpoint as prediction has it: at rest, with an attention that runs here."""
    dtype = loading.weight_dtype(config.train.mixed_precision)
    transformer = loading.load_transformer(family, folder, dtype, config.model, device, say=console.say)
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
        lora_files.fitting_layers(skeleton, lora, family.pipeline)
