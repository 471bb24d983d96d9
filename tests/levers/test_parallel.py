"""What the launch configuration asks of FSDP2: what is read from it, and every refusal. No process is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import tiny_transformer

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.levers.parallel import Sharding, check, check_base, requested
from qwen_image_finetune.levers.stored_precision import Precision

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    """The request is read once a process."""
    requested.cache_clear()
    yield
    requested.cache_clear()


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sharding | None]:
    def ask(**environment: str) -> Sharding | None:
        for name, value in {**ASKED, **environment}.items():
            monkeypatch.setenv(name, value)
        return requested()

    return ask


def test_what_is_asked_for(launch: Callable[..., Sharding | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert requested() is None
    requested.cache_clear()
    assert launch() == Sharding()
    requested.cache_clear()
    named = launch(FSDP_TRANSFORMER_CLS_TO_WRAP="FluxTransformerBlock", FSDP_RESHARD_AFTER_FORWARD="false")
    assert named == Sharding(("FluxTransformerBlock",), reshard_after_forward=False)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, r"fsdp_version: 1 is not used here; write 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, r"fsdp_offload_params: true is refused: shards stay on their devices"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"activation_checkpointing: true .*train\.gradient_checkpointing"),
        (
            {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "1000"},
            r"SIZE_BASED_WRAP is refused: .*TRANSFORMER_BASED_WRAP",
        ),
    ],
)
def test_launch_configurations_that_are_refused(
    environment: dict[str, str], message: str, launch: Callable[..., Sharding | None]
) -> None:
    with pytest.raises(ConfigError, match=message):
        launch(**environment)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantize=true", r"model\.quantize with FSDP: .*ddp\.yaml, or set model\.quantize=false"),
        ("model.quantize=nf4", r"model\.quantize with FSDP"),
        ("train.offload_activations=true", r"offload_activations with FSDP: .*train\.gradient_checkpointing"),
        ("train.mixed_precision=fp16", r"fp16 with FSDP: .*use bf16"),
        ("optimizer.class_path=bitsandbytes.optim.Adam8bit", r"Adam8bit with FSDP: .*torch\.optim\.AdamW"),
        ("optimizer.class_path=prodigyopt.Prodigy", r"Prodigy with FSDP: .*torch\.optim\.AdamW"),
        ("optimizer.class_path=torch.optim.Muon", r"Muon with FSDP: it looks at whole matrices.*torch\.optim\.AdamW"),
        (
            "model.lora=null train.mixed_precision=bf16 train.weight_precision=bf16",
            r"weight_precision=bf16 with FSDP: .*weight_precision=fp32",
        ),
        ("model.lora.use_dora=true", r"use_dora=true with FSDP: its file holds lengths of the base's rows.*ddp\.yaml"),
        ("model.lora.init_lora_weights=pissa", r"init_lora_weights='pissa' with FSDP .*gaussian"),
        ("model.lora.init_lora_weights=olora", r"init_lora_weights='olora' with FSDP"),
    ],
)
def test_runs_that_are_refused(override: str, message: str, configure: Callable[..., Config]) -> None:
    config = configure("FluxKontext", "optimizer.init_args={}", *override.split())
    with pytest.raises(ConfigError, match=message):
        check(Sharding(), config, processes=2)
    check(None, config, processes=2)


@pytest.mark.parametrize("override", ["type=lokr", "type=loha", "type=oft", "max_norm=1.0", "lora_dropout=0.1"])
def test_adapters_that_can_be_cut(override: str, configure: Callable[..., Config]) -> None:
    config = configure("FluxKontext", "model.lora.init_lora_weights=true", f"model.lora.{override}")
    check(Sharding(), config, processes=2)


def test_one_process_has_nobody_to_share_with(configure: Callable[..., Config]) -> None:
    config = configure("FluxKontext")
    check(Sharding(), config, processes=2)
    with pytest.raises(ConfigError, match=r"asks for FSDP, but one process runs.*one_card\.yaml"):
        check(Sharding(), config, processes=1)


@pytest.mark.parametrize("format", ["fp8", "int8", "nf4", "fp4"])
def test_a_base_that_came_quantised_is_refused(format: str, tmp_path: Path) -> None:
    """e4m3 and int8 weights have the shape of whole ones, so they could be read, without their scales, as another."""
    found = Precision(format, stored=True, source="dtypes of its safetensors files")
    with pytest.raises(ConfigError, match=rf"are {format} \(dtypes .*, with FSDP: .*ddp\.yaml, or name a checkpoint"):
        check_base(Sharding(), tmp_path, found)
    check_base(None, tmp_path, found)
    check_base(Sharding(), tmp_path, Precision(None, stored=False, source=""))


def test_of_a_whole_model_only_the_process_that_writes_makes_copies() -> None:
    tensor = torch.ones(3)
    kept = parallel.host_copy(tensor, keep=True)
    assert kept is not None and torch.equal(kept, tensor) and kept.data_ptr() != tensor.data_ptr()
    assert parallel.host_copy(tensor, keep=False) is None


def test_blocks_that_the_model_does_not_have_are_refused() -> None:
    model: Any = tiny_transformer("flux")
    with pytest.raises(ConfigError, match=r"cls_to_wrap='LlamaDecoderLayer' is in no module of FluxTransformer2DModel"):
        parallel.shard(model, Sharding(("LlamaDecoderLayer",)), torch.device("cpu"))
