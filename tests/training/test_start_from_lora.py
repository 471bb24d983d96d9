"""A run that starts from a LoRA: with the ranks of its file, and bit for bit where the file is our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.training.train import train
from qwen_image_finetune.training.trained import exact

Configure = Callable[..., Config]
TARGETS = "model.lora.target_modules=[to_q,to_k]"


def newest(run: Path | None) -> Path:
    assert run is not None
    return max(run.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def change(factors: dict[str, Tensor], module: str, scale: float = 1.0) -> Tensor:
    return scale * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]


@pytest.mark.parametrize("alpha", [8, 6, 1])  # of rank 4: a power of two, and scales that round
def test_a_checkpoint_of_our_own_comes_back_bit_for_bit(alpha: int, configure: Configure) -> None:
    """The scale lora_alpha / r is multiplied into the factors of the file that users take."""
    same = (f"model.lora.lora_alpha={alpha}", "train.max_train_steps=5")
    first = newest(train(configure("FluxKontext", *same, "optimizer.init_args.lr=0.01")))
    for start in (first, first / "pytorch_lora_weights.safetensors"):
        still = ("optimizer.init_args.lr=0.0", "logging.tracker_project_name=second")
        second = newest(train(configure("FluxKontext", *same, *still, f"model.lora.pretrained_weight={start}")))
        for name, weight in exact(first).items():
            assert torch.equal(exact(second)[name], weight)
    users = load_file(first / "pytorch_lora_weights.safetensors")
    module = next(iter(users)).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    wanted = change(exact(first), module.removeprefix("transformer."), alpha / 4)
    torch.testing.assert_close(change(users, module), wanted)


def test_a_file_of_another_adapter_is_not_taken_for_the_checkpoint_beside_it(configure: Configure) -> None:
    first = newest(train(configure("FluxKontext", "train.max_train_steps=5", "optimizer.init_args.lr=0.01")))
    file = first / "pytorch_lora_weights.safetensors"
    changed = {name: weight * 1.5 for name, weight in load_file(file).items()}
    save_file(changed, file)
    still = ("train.max_train_steps=1", "optimizer.init_args.lr=0.0", f"model.lora.pretrained_weight={file}")
    second = newest(train(configure("FluxKontext", *still, "logging.tracker_project_name=second")))
    assert all(torch.equal(weight, changed[f"transformer.{name}"]) for name, weight in exact(second).items())


def test_ranks_may_be_mixed_and_a_resume_keeps_them(configure: Configure, tmp_path: Path) -> None:
    plain = newest(train(configure("FluxKontext", TARGETS, "train.max_train_steps=5")))
    file, generator = tmp_path / "mixed.safetensors", torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    for key, weight in load_file(plain / "pytorch_lora_weights.safetensors").items():
        rank = 8 if ".to_k." in key else 4
        shape = (rank, weight.shape[1]) if "lora_A" in key else (weight.shape[0], rank)
        state[key] = 0.1 * torch.randn(shape, generator=generator)
    save_file(state, file)
    options: Any = (TARGETS, "train.checkpointing_steps=3", f"model.lora.pretrained_weight={file}",
                    "train.max_train_steps=6", "logging.tracker_project_name=mixed")  # fmt: skip
    still = newest(train(configure("FluxKontext", *options, "train.max_train_steps=1", "optimizer.init_args.lr=0.0")))
    saved = load_file(still / "pytorch_lora_weights.safetensors")
    modules = {key.rpartition(".lora_")[0] for key in state}
    assert {key: tensor.shape for key, tensor in saved.items()} == {key: tensor.shape for key, tensor in state.items()}
    for module in modules:
        torch.testing.assert_close(change(saved, module), change(state, module))

    whole = train(configure("FluxKontext", *options))
    assert whole is not None
    wanted = exact(newest(whole))
    middle = next(whole.glob("checkpoint-*-3"))
    resume = ("model.lora.pretrained_weight=null", f"train.resume_from_checkpoint={middle}")  # the file is of no use
    again = train(configure("FluxKontext", *options, *resume))
    assert again == whole
    assert all(torch.equal(weight, wanted[name]) for name, weight in exact(newest(again)).items())

    with pytest.raises(ConfigError, match=r"The file has rank 4, 8 .*the config has r=16.*to one of the file's"):
        train(configure("FluxKontext", *options, "model.lora.r=16"))
