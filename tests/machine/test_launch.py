"""What a launcher asked for, and where encoders may live: rules, without any process being started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qwen_image_finetune.machine.launch import LaunchError, asked_for, check_cards, check_start, encoder_device
from qwen_image_finetune.machine.processes import Team

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "parent", "asked"),
    [
        ({}, [], 1),
        ({"WORLD_SIZE": "4", "RANK": "1"}, [], 4),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, [], 3),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "2"}, [], 8),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"}, [], 16),  # a torchrun on each of two machines
        ({"MASTER_ADDR": "node1"}, [], 1),  # left over from something else
        (ACCELERATE, ["accelerate", "launch", "--cpu", "--num_processes", "4", "train.py"], 4),
        (ACCELERATE, ["accelerate", "launch", "--num_processes=3", "train.py"], 3),
        (ACCELERATE, ["accelerate", "launch", "--config_file", "mine.yaml", "train.py"], 2),
        ({**ACCELERATE, "WORLD_SIZE": "1"}, ["accelerate", "launch", "train.py"], 1),
    ],
)
def test_asked_for(environment: dict[str, str], parent: list[str], asked: int) -> None:
    assert asked_for(environment, parent)[0] == asked


def test_fewer_processes_than_asked_for_are_refused() -> None:
    with pytest.raises(
        LaunchError, match=r"4 processes were asked for \(accelerate launch\), but 1 takes part.*torchrun"
    ):
        check_start(1, ACCELERATE, ["accelerate", "launch", "--cpu", "--num_processes", "4"])
    with pytest.raises(LaunchError, match=r"8 processes were asked for \(srun\)"):
        check_start(1, {"SLURM_STEP_NUM_TASKS": "8"}, [])
    check_start(4, {"WORLD_SIZE": "4"}, [])
    check_start(1, {}, [])


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_engines_that_are_not_used_are_refused(name: str) -> None:
    with pytest.raises(LaunchError, match=r"fsdp2\.yaml"):
        check_start(2, {"WORLD_SIZE": "2", name: "true"}, [])


def test_more_processes_than_cards_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"4 processes .* 2 cards: start 2"):
        check_cards({"LOCAL_WORLD_SIZE": "4"}, 2)
    check_cards({"LOCAL_WORLD_SIZE": "2"}, 2)
    check_cards({"LOCAL_WORLD_SIZE": "4"}, 0)
    check_cards({"LOCAL_WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "True"}, 2)


@pytest.mark.parametrize(
    ("name", "home", "processes", "device"),
    [
        (None, "cuda:3", 4, "cuda:3"),
        ("cuda", "cuda:3", 4, "cuda:3"),
        ("cpu", "cuda:3", 4, "cpu"),
        ("cuda:1", "cuda:0", 1, "cuda:1"),
        ("cuda", "cpu", 1, "cuda"),
        ("cuda:0", "cuda:0", 2, None),
        ("cuda:7", "cuda:1", 2, None),
    ],
)
def test_encoder_device(name: str | None, home: str, processes: int, device: str | None) -> None:
    if device is None:
        with pytest.raises(LaunchError, match=rf"cache\.vae_encoder_device='{name}' with 2 processes .* 'cuda'"):
            encoder_device(name, "cache.vae_encoder_device", home, processes)
    else:
        assert encoder_device(name, "cache.vae_encoder_device", home, processes) == device


@pytest.mark.parametrize("section", ["cache", "train"])
@pytest.mark.parametrize("name", ["vae_encoder_device", "text_encoder_device", "text_encoder_2_device"])
def test_encoders_of_several_processes(section: str, name: str, configure: Callable[..., Any]) -> None:
    """By the CPU or the process's own card; a card by its number is refused, before it is looked for."""
    import torch

    from qwen_image_finetune.machine.accelerator import encoder_homes

    def homes(value: str) -> Any:
        part = getattr(configure("FluxKontext", f"{section}.{name}={value}"), section)
        return encoder_homes(part, section, torch.device("cuda", 3), Team(local_size=4))

    component = name.removesuffix("_device").removesuffix("_encoder") if "vae" in name else name.removesuffix("_device")
    assert homes("cuda")[component] == homes("null")[component] == torch.device("cuda", 3)
    assert homes("cpu")[component] == torch.device("cpu")
    with pytest.raises(LaunchError, match=rf"{section}\.{name}='cuda:1' with 4 processes on this machine"):
        homes("cuda:1")


@pytest.mark.parametrize("name", ["vae", "text_encoder", "text_encoder_2", "transformer"])
def test_prediction_by_several_processes(
    name: str, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_image_finetune.drawing.build import build_predictor

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(LaunchError, match=rf"predict\.devices\.{name}='cuda:1' with 2 processes on this machine"):
        build_predictor(configure("FluxKontext", f"predict.devices.{name}=cuda:1"))
