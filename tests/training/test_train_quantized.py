"""Training on a quantised base: it learns about the same, resumes bit for bit, and keeps the precision it came in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.command.dry_run import lines
from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.drawing.build import build_predictor
from qwen_image_finetune.families import get_family
from qwen_image_finetune.levers import quantized_linear
from qwen_image_finetune.levers.quantize import quantize
from qwen_image_finetune.levers.quantized_linear import E4M3, QuantizedLinear
from qwen_image_finetune.levers.recompute import blocks
from qwen_image_finetune.training.train import train
from tests.kin import TWO, UNLIKE

FORMATS = ("fp8", "int8", "nf4", "fp4")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Configure = Callable[..., Config]


def describe(config: Config) -> str:
    return "\n".join(lines(config))


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what is encoded is looked at."""
    return tmp_path / "cache"


def newest(run: Path | None) -> Path:
    assert run is not None
    return max(run.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def losses(run: Path | None) -> list[float]:
    assert run is not None
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("name", UNLIKE)
def test_losses_stay_near_those_of_full_precision(
    name: str, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    family = get_family(name)
    model = family.transformer.from_pretrained(configure(name).model.pretrained_model_name_or_path + "/transformer")
    layers = sum(isinstance(layer, torch.nn.Linear) for block in blocks(model) for layer in block.modules())
    exact = losses(train(configure(name, "train.max_train_steps=4")))
    bounds = {"fp8": 0.05, "int8": 0.02, "nf4": 0.15, "fp4": 0.2}
    # Which layers are exchanged is the family's; how they multiply is not.
    for format, tolerance in bounds.items() if name in TWO else [("fp8", bounds["fp8"])]:
        found = losses(train(configure(name, "train.max_train_steps=4", f"model.quantize={format}")))
        assert found == pytest.approx(exact, rel=tolerance)
        assert found != exact
        assert f"frozen base in {format}: {layers} " in capsys.readouterr().out


@pytest.mark.parametrize("format", FORMATS)
def test_resume_is_bit_identical(format: str, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """With recomputation and a base in bfloat16, int8 multiplied in int8, as on a card."""
    monkeypatch.setattr(quantized_linear, "has_int8_products", lambda device: True)
    name = UNLIKE[FORMATS.index(format) % 2]
    same = (f"model.quantize={format}", "train.checkpointing_steps=2", "train.max_train_steps=4",
            "train.mixed_precision=bf16", "train.gradient_checkpointing=true")  # fmt: skip
    whole = train(configure(name, *same, "logging.tracker_project_name=whole"))
    assert whole is not None
    checkpoint = next(whole.glob("checkpoint-*-2"))
    resumed = train(
        configure(name, *same, f"train.resume_from_checkpoint={checkpoint}", "logging.tracker_project_name=other")
    )
    assert losses(resumed) == losses(whole)[2:]
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert_equal(load_file(newest(resumed) / file), load_file(newest(whole) / file))


def test_recomputation_changes_nothing(configure: Configure) -> None:
    options = ("model.quantize=fp8", "train.max_train_steps=2")
    plain = train(configure("QwenImageEdit", *options))
    recomputed = train(configure("QwenImageEdit", *options, "train.gradient_checkpointing=true"))
    assert_equal(
        load_file(newest(plain) / "adapter.safetensors"), load_file(newest(recomputed) / "adapter.safetensors")
    )


@pytest.fixture
def fp8_checkpoint(flux_folder: Path, tmp_path: Path) -> Path:
    """The tiny Kontext with every weight of its transformer in e4m3, without scales."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(flux_folder, folder)
    path = folder / "transformer" / WEIGHTS
    tensors = {name: tensor.to(E4M3) for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)
    return folder


def test_a_checkpoint_in_fp8_is_trained_on_as_it_is(
    fp8_checkpoint: Path, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"model.pretrained_model_name_or_path={fp8_checkpoint}"
    exact = losses(train(configure("FluxKontext", "train.max_train_steps=3")))
    capsys.readouterr()
    found = losses(train(configure("FluxKontext", place, "train.max_train_steps=3")))
    assert "frozen base in fp8 as stored: 50 of 50 linear layers" in capsys.readouterr().out
    assert found == pytest.approx(exact, rel=0.1)
    assert "frozen base in fp8, as the checkpoint is (dtypes" in describe(configure("FluxKontext", place))


def test_contradicting_precisions_are_refused_before_anything_is_encoded(
    fp8_checkpoint: Path, configure: Configure
) -> None:
    config = configure("FluxKontext", f"model.pretrained_model_name_or_path={fp8_checkpoint}", "model.quantize=nf4")
    for run in (describe, train):
        with pytest.raises(ConfigError, match=r"model\.quantize='nf4', but the weights in .* are already fp8"):
            run(config)
    assert not Path(config.cache.cache_dir).exists()
    full = configure("FluxKontext", f"model.pretrained_model_name_or_path={fp8_checkpoint}", "model.lora=null")
    with pytest.raises(ConfigError, match="cannot be fully fine-tuned"):
        describe(full)


@pytest.mark.parametrize("format", ["true", "nf4"])
def test_dry_run_shows_the_layers_that_fit_worst(format: str, configure: Configure) -> None:
    said = describe(configure("QwenImageEdit", f"model.quantize={format}"))
    assert f"frozen base quantised to {'fp8' if format == 'true' else format}; errors of 42 layers" in said
    shown = [line.split() for line in said.splitlines() if "%  transformer_blocks." in line]
    errors = [float(words[0].rstrip("%")) for words in shown]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert "0 above" in said
    assert "on the card while training: " in said.partition("memory:   ")[2]


def test_dry_run_of_a_checkpoint_elsewhere_says_what_is_planned(configure: Configure) -> None:
    config = configure("FluxKontext", "model.pretrained_model_name_or_path=black-forest-labs/FLUX.1-Kontext-dev",
                       "model.quantize=true", "train.trainer=FluxKontext")  # fmt: skip
    said = describe(config)
    assert "frozen base quantised to fp8\n" in said
    assert "memory:   `qif plan` predicts it from the architecture\n" in said


def test_prediction_uses_the_precision_of_training(configure: Configure) -> None:
    predictor = build_predictor(configure("FluxKontext", "model.quantize=fp8"))
    reference = get_family("FluxKontext").transformer.from_pretrained(
        configure("FluxKontext").model.pretrained_model_name_or_path, subfolder="transformer"
    )
    quantize(reference, "fp8")
    loaded = predictor.transformer.state_dict()
    assert_equal(loaded, reference.state_dict())
    assert any(isinstance(module, QuantizedLinear) for module in predictor.transformer.modules())


def test_scaled_fp8_text_encoders_are_refused(flux_folder: Path, tmp_path: Path, configure: Configure) -> None:
    """transformers would take the stored numbers for the weights, and leave the scales aside."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(flux_folder, folder)
    path = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors |= {name: tensors[name].to(E4M3), f"{name.removesuffix('.weight')}.scale_weight": torch.ones(())}
    path.unlink()
    save_file(tensors, path)
    config = configure("FluxKontext", f"model.pretrained_model_name_or_path={folder}")
    with pytest.raises(ConfigError, match=r"text_encoder_2.* fp8 with scales"):
        train(config)
