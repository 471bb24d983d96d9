"""What does not fit the transformer is said by every command that looks, and before anything is encoded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.training.check import run_problems
from qwen_image_finetune.training.train import train

Configure = Callable[..., Config]


def another_rank(configure: Configure, folder: Path) -> list[str]:
    run = train(configure("FluxKontext", "model.lora.r=2", "train.max_train_steps=5"))
    assert run is not None
    shutil.rmtree(run.parents[2] / "cache")
    return [f"model.lora.pretrained_weight={run}"]


def unknown_target(configure: Configure, folder: Path) -> list[str]:
    return ["model.lora.target_modules=[to_qq]"]


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
