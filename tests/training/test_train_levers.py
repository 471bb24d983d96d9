"""Levers of memory and speed in whole runs: they change nothing but memory and speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.training.job import check_sharing
from qwen_image_finetune.training.train import train

Configure = Callable[..., Config]
STEPS = "train.max_train_steps=5"


def weights(run: Path | None) -> dict[str, torch.Tensor]:
    assert run is not None
    [folder] = run.glob("checkpoint-*-5")
    files = [*folder.glob("adapter.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


LEVERS = {
    "recompute": ("train.gradient_checkpointing=true", "train.keep_activations=0.5"),
    "swap": ("train.gradient_checkpointing=true", "train.blocks_to_swap=3"),
    "offload": ("train.offload_activations=true",),
    "together": (
        "train.gradient_checkpointing=true",
        "train.keep_activations=none",
        "train.blocks_to_swap=2",
        "train.offload_activations=true",
    ),
}


@pytest.mark.parametrize(
    "family,precision,levers",
    [
        *(("QwenImageEdit", precision, tuple(LEVERS)) for precision in ("no", "bf16")),
        ("Flux2Klein", "bf16", ("together",)),  # blocks of two kinds, and modulation that all of them share
    ],
)
def test_a_run_is_bit_equal_to_one_without(
    family: str, precision: str, levers: tuple[str, ...], configure: Configure
) -> None:
    same = (STEPS, f"train.mixed_precision={precision}", "train.seed=3")
    plain = train(configure(family, *same))
    expected = weights(plain)
    for name in levers:
        levered = train(configure(family, *same, *LEVERS[name]))
        assert plain != levered
        found = weights(levered)
        assert expected.keys() == found.keys()
        assert not [key for key in expected if not torch.equal(expected[key], found[key])], name


def test_released_gradients_reach_the_same_weights(configure: Configure) -> None:
    same = (STEPS, "model.lora=null", "train.max_grad_norm=null", "optimizer.init_args.lr=1e-3")
    plain = train(configure("FluxKontext", *same))
    released = train(configure("FluxKontext", *same, "train.release_gradients=true"))
    expected, found = weights(plain), weights(released)
    assert len(expected) > 20
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_auto_without_a_card_trains_as_usual_and_says_so(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(configure("FluxKontext", STEPS))
    automatic = train(configure("FluxKontext", STEPS, "train.memory=auto", "train.low_memory=true"))
    expected, found = weights(plain), weights(automatic)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "no card here: memory is not tuned" in capsys.readouterr().out


def test_what_several_processes_exclude_is_refused(configure: Configure) -> None:
    released = ("model.lora=null", "train.max_grad_norm=null", "train.release_gradients=true")
    with pytest.raises(ConfigError, match=r"train\.release_gradients=true with 2 processes"):
        check_sharing(configure("FluxKontext", *released), 2, shared=False)
    swapped = ("train.gradient_checkpointing=true", "train.blocks_to_swap=1")
    with pytest.raises(ConfigError, match=r"train\.blocks_to_swap with FSDP"):
        check_sharing(configure("FluxKontext", *swapped), 2, shared=True)
    with pytest.raises(ConfigError, match=r"train\.low_memory with FSDP"):
        check_sharing(configure("FluxKontext", "train.low_memory=true"), 2, shared=True)
    check_sharing(configure("FluxKontext", *swapped), 2, shared=False)
