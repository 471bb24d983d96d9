"""Advice when memory runs out: keys that exist, least loss first, nothing that is on already or would not help."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.config.words import known_keys
from qwen_image_finetune.fitting.out_of_memory import OutOfMemory, advice, explained
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.levers.parallel import Sharding
from qwen_image_finetune.training.job import check_sharing

Configure = Callable[..., Config]
KEY = re.compile(r"((?:train|model|data|cache|optimizer|validation|predict)\.[\w.]*\w)(?:=([\w.]+))?")
COSTS = ("same", "clipped", "rounded", "rounded more", "less detail")


def keys(lines: list[str]) -> list[str]:
    """The keys that each line begins with."""
    found = [KEY.match(line.removeprefix("a smaller ")) for line in lines]
    return [match[1] for match in found if match]


def test_every_lever_is_named_in_the_order_of_what_it_costs(configure: Configure) -> None:
    lines = advice(configure("FluxKontext", "model.lora.r=16", "data.batch_size=2"), "training")
    assert keys(lines) == [
        "train.gradient_checkpointing",
        "data.batch_size",
        "train.offload_activations",
        "train.blocks_to_swap",
        "train.mixed_precision",
        "optimizer.class_path",
        "model.quantize",
        "data.init_args.resolution",
        "model.lora.r",
    ]


def test_prediction_is_advised_what_changes_prediction(configure: Configure) -> None:
    lines = advice(configure("FluxKontext", "train.low_memory=true"), "predicting")
    assert keys(lines) == ["predict.devices.text_encoder", "train.mixed_precision", "model.quantize", "model.quantize"]


def test_what_is_on_is_not_advised(configure: Configure) -> None:
    everything = ("train.gradient_checkpointing=true", "train.keep_activations=none", "train.offload_activations=true",
                  "train.blocks_to_swap=3", "train.mixed_precision=bf16", "model.quantize=nf4",
                  "optimizer.class_path=bitsandbytes.optim.AdamW8bit")  # fmt: skip
    assert keys(advice(configure("FluxKontext", *everything), "training")) == ["data.init_args.resolution"]


@pytest.mark.parametrize("doing", ["encoding the data set", "loading the transformer", "training", "drawing samples"])
@pytest.mark.parametrize("on_card", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("cache.use_cache=false", "model.quantize=fp8", "data.num_workers=2"),
        ("train.compile=true", "train.gradient_checkpointing=true", "data.batch_size=4"),
        ("model.lora=null", "train.mixed_precision=bf16"),
    ],
)
def test_advice_can_be_followed(
    doing: str, on_card: bool, overrides: tuple[str, ...], configure: Configure, tmp_path: object
) -> None:
    """Each line's settings are keys that exist, and the configuration with them is accepted."""
    config = configure("QwenImageEdit", *overrides)
    lines = advice(config, doing, on_card)
    assert len(lines) >= 3
    for line in lines:
        head = line.partition(": ")[0]
        settings = KEY.findall(head)
        assert {key for key, _ in settings} <= known_keys().keys(), line
        given = [f"{key}={value}" for key, value in settings if value]
        load_config(f"{tmp_path}/config.yaml", [*overrides, *given])
    costs = [max(place for place, word in enumerate(COSTS) if word in line) for line in lines if
             any(word in line for word in COSTS)]  # fmt: skip
    assert costs == sorted(costs)
    if doing != "training":
        assert not {"train.gradient_checkpointing", "optimizer.class_path", "data.batch_size"} & set(keys(lines))


@pytest.mark.parametrize("doing", ["loading the encoders", "loading the transformer", "training", "drawing samples"])
@pytest.mark.parametrize("on_card", [True, False])
@pytest.mark.parametrize("overrides", [(), ("cache.use_cache=false", "data.batch_size=2"), ("model.lora=null",)])
def test_advice_for_a_shared_model_is_not_refused(
    doing: str, on_card: bool, overrides: tuple[str, ...], configure: Configure, tmp_path: object
) -> None:
    lines = advice(configure("QwenImageEdit", *overrides), doing, on_card, shared=True)
    assert len(lines) >= 3
    for line in lines:
        given = [f"{key}={value}" for key, value in KEY.findall(line.partition(": ")[0]) if value]
        config = load_config(f"{tmp_path}/config.yaml", [*overrides, *given])
        parallel.check(Sharding(), config, processes=2)
        check_sharing(config, 2, shared=True)


def test_the_error_knows_of_a_shared_model(configure: Configure) -> None:
    with pytest.raises(OutOfMemory) as raised, explained(configure("FluxKontext"), "training", shared=True):
        raise torch.OutOfMemoryError
    assert "train.gradient_checkpointing" in str(raised.value)
    assert "train.blocks_to_swap" not in str(raised.value)


def test_the_hosts_memory_is_not_filled_further(configure: Configure) -> None:
    swapped = ("train.gradient_checkpointing=true", "train.blocks_to_swap=2", "train.offload_activations=true")
    on_host = advice(configure("FluxKontext", *swapped), "training", on_card=False)
    assert any(line.startswith("train.offload_activations=false") for line in on_host)
    assert any(line.startswith("train.blocks_to_swap lower") for line in on_host)
    plain = advice(configure("FluxKontext"), "training", on_card=False)
    assert not {"train.offload_activations", "train.blocks_to_swap"} & set(keys(plain))


@pytest.mark.parametrize(
    ("error", "swaps"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), True),
        (MemoryError(), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_the_error_says_where_and_what_helps(error: Exception, swaps: bool, configure: Configure) -> None:
    with (
        pytest.raises(OutOfMemory, match="memory ran out while training") as raised,
        explained(configure("FluxKontext"), "training"),
    ):
        raise error
    assert ("train.blocks_to_swap" in str(raised.value)) is swaps
    assert "\nmore" not in str(raised.value)


def test_other_errors_pass(configure: Configure) -> None:
    with pytest.raises(RuntimeError, match="shapes") as raised, explained(configure("FluxKontext"), "training"):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(raised.value, OutOfMemory)
