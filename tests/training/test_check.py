"""What does not fit the transformer is said by every command that looks, and before anything is encoded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.config import Config, ConfigError, OptimizerConfig, SchedulerConfig
from qwen_image_finetune.training.check import is_plain, run_problems
from qwen_image_finetune.training.optim import build_optimizer, build_scheduler
from qwen_image_finetune.training.train import train

Configure = Callable[..., Config]


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what is encoded is looked at."""
    return tmp_path / "cache"


def another_rank(configure: Configure, folder: Path) -> list[str]:
    run = train(configure("FluxKontext", "model.lora.r=2", "train.max_train_steps=5"))
    assert run is not None
    shutil.rmtree(run.parents[2] / "cache")
    return [f"model.lora.pretrained_weight={run}"]


def unknown_target(configure: Configure, folder: Path) -> list[str]:
    return ["model.lora.target_modules=[to_qq]"]


def unknown_pattern(configure: Configure, folder: Path) -> list[str]:
    return ["model.lora.alpha_pattern={to_qq: 2}"]


def no_divisor(configure: Configure, folder: Path) -> list[str]:
    return ["model.lora.type=oft", "model.lora.oft_block_size=7", "model.lora.init_lora_weights=true"]


def too_many_directions(configure: Configure, folder: Path) -> list[str]:
    return ["model.lora.init_lora_weights=pissa", "model.lora.rank_pattern={to_q: 400}"]


def unknown_key(configure: Configure, folder: Path) -> list[str]:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zero_cond_u": True}))
    return []


def without_weights(configure: Configure, folder: Path) -> list[str]:
    for path in (folder / "transformer").glob("*.safetensors"):
        path.unlink()
    return []


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> list[str]:
    [path] = (folder / "transformer").glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path)
    return []


def renamed_tensors(configure: Configure, folder: Path) -> list[str]:
    return with_tensors(folder, lambda state: state.update({"x_in.weight": state.pop("x_embedder.weight")}))


def another_shape(configure: Configure, folder: Path) -> list[str]:
    return with_tensors(folder, lambda state: state.update({"x_embedder.bias": torch.zeros(7)}))


@pytest.mark.parametrize(
    "fault, words",
    [
        (renamed_tensors, "1 weights of a FluxTransformer2DModel are missing ['x_embedder.weight'], 1 of its tensors"),
        (another_shape, "x_embedder.bias is (7,), config.json makes it"),
        (another_rank, "The file has rank 2"),
        (unknown_target, "'to_qq' matches no linear layer"),
        (unknown_pattern, "model.lora.alpha_pattern: 'to_qq' matches no target"),
        (too_many_directions, "model.lora.r=400 is more than a layer of (128, 128) has directions"),
        (no_divisor, "model.lora.oft_block_size=7 does not divide the"),
        (unknown_key, "has keys ['zero_cond_u']"),
        (without_weights, "safetensors"),
    ],
)
def test_it_is_refused_before_anything_is_encoded(
    fault: Callable[[Configure, Path], list[str]],
    words: str,
    configure: Configure,
    flux_folder: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(flux_folder, tmp_path / "base"))
    config = configure("FluxKontext", *fault(configure, folder), f"model.pretrained_model_name_or_path={folder}")
    [problem] = run_problems(config)
    assert words in problem
    with pytest.raises(ConfigError) as refused:
        train(config)
    assert words in str(refused.value)
    assert not (tmp_path / "cache").exists()


def test_a_sound_configuration_has_no_problems(configure: Configure) -> None:
    assert run_problems(configure("FluxKontext")) == []


SOUND: list[dict[str, Any]] = [{"lr": 1e-3}, {"lr": 0, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}]
ODD: list[dict[str, Any]] = [
    {"lr": -1}, {"lr": "1e-3"}, {"betas": [0.9, 1.0]}, {"betas": 0.9}, {"betas": [0.9]}, {"eps": [1e-8]}, {"eps": -1.0},
    {"weight_decay": True}, {"momentum": 0.9}, {"lr": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("class_path", ["torch.optim.Adam", "torch.optim.AdamW", "torch.optim.SGD"])
@pytest.mark.parametrize("given", SOUND + ODD)
def test_what_is_plain_can_be_built(class_path: str, given: dict[str, Any]) -> None:
    """What is believed without torch is what torch takes; and torch says in words what it does not."""
    optimizer = OptimizerConfig.model_construct(class_path=class_path, init_args=given)
    names = get_args(SchedulerConfig.model_fields["scheduler_type"].annotation)
    plain = {name for name in names if is_plain(optimizer, SchedulerConfig(scheduler_type=name))}
    assert plain == ({*names} - {"polynomial"} if given in SOUND and class_path != "torch.optim.SGD" else set())
    try:
        built = build_optimizer(optimizer, [torch.nn.Parameter(torch.zeros(1))])
    except ConfigError:
        assert not plain
        return
    for name in plain:
        build_scheduler(SchedulerConfig(scheduler_type=name), built, 10)


def test_an_optimizer_that_takes_no_such_gradients(configure: Configure) -> None:
    config = configure("FluxKontext", "optimizer={class_path: torch.optim.SparseAdam, init_args: {lr: 0.1}}")
    assert any("SparseAdam cannot take a step here" in line for line in run_problems(config))


@pytest.mark.parametrize("name", ["forward", "keys", "training", "default"])
def test_names_that_an_adapter_cannot_have(configure: Configure, name: str) -> None:
    found = run_problems(configure("FluxKontext", f"model.lora.adapter_name={name}"))
    assert (name == "default") == (not any("adapter_name" in line for line in found))
