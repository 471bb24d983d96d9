"""Devices and processes of a run, as a launcher started them."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

import torch

from qwen_image_finetune.config import CacheConfig, Config, ConfigError, TrainConfig
from qwen_image_finetune.machine import launch, processes
from qwen_image_finetune.machine.processes import Team

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_accelerator(config: Config) -> Accelerator:
    """Devices and processes, as `accelerate launch` or torchrun started them.

    Raises:
        ConfigError: fp16 without an accelerator; a device that is not there.
        LaunchError: fewer processes take part than were asked for, or more than there are cards.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    if config.train.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("train.mixed_precision='fp16' needs a GPU; this machine has none: use 'bf16' or 'no'")
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
        return home if chosen == str(home) else resolve_device(chosen, f"{section}.{key}")

    return {
        "default": home,
        "vae": place(part.vae_encoder_device, "vae_encoder_device"),
        "text_encoder": place(part.text_encoder_device, "text_encoder_device"),
        "text_encoder_2": place(part.text_encoder_2_device, "text_encoder_2_device"),
    }


def resolve_device(name: str | None, key: str) -> torch.device:
    """The device called `name`; without a name, the first accelerator, else the CPU.

    Raises:
        ConfigError: it is not there; the message lists the ones that are.
    """
    present = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        present += [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
    if name is None:
        return torch.device(present[1] if len(present) > 1 else "cpu")
    device = torch.device(name)
    wanted = device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    if wanted not in present:
        raise ConfigError(f"{key}={name!r} is not a device of this machine; there are {present}")
    return device
