"""The moving average of what is trained: against diffusers' own, seen by validation, saved, and taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config
from qwen_image_finetune.disk.versions import LORA_WEIGHTS
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.estimate import AVERAGE, Estimator
from qwen_image_finetune.training import average
from qwen_image_finetune.training.checkpoint_average import AverageError, Request
from qwen_image_finetune.training.checkpoint_average import average as average_checkpoints
from qwen_image_finetune.training.train import train
from qwen_image_finetune.training.trained import exact, halves

Configure = Callable[..., Config]
EMA = "train.ema={enabled: true, decay: 0.5, start_step: 1, every: 2}"


def rounds(folder: Path, steps: int) -> str:
    settings = {
        "enabled": True,
        "steps": steps,
        "num_validation_samples": 1,
        "num_inference_steps": 1,
        "num_loss_sigmas": 1,
    }
    return f"validation={json.dumps({**settings, 'dataset_path': str(folder)})}"


def saved(run: Path | None, step: int) -> Path:
    assert run is not None
    return next(run.glob(f"checkpoint-*-{step}"))


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


class Weights(torch.nn.Module):
    """What stands for a transformer: one weight."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(7, 5, dtype=dtype))


@pytest.fixture
def full(configure: Configure) -> Callable[..., Config]:
    return lambda *overrides: configure("FluxKontext", "model.lora=null", *overrides)


def test_it_is_that_of_diffusers(full: Callable[..., Config]) -> None:
    """With the same warm-up, in float32; a bfloat16 model has its average in float32 too."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Weights(dtype)
        ours = average.Average(full("train.ema={enabled: true, decay: 0.6}"), model)
        theirs = EMAModel([model.weight.detach().float()], decay=0.6)
        for _ in range(30):
            with torch.no_grad():
                model.weight += torch.randn(7, 5).to(dtype)
            ours.take()
            theirs.step([torch.nn.Parameter(model.weight.detach().float())])
        torch.testing.assert_close(ours.values["weight"], theirs.shadow_params[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchanged_twice_nothing_has_changed(dtype: torch.dtype, full: Callable[..., Config]) -> None:
    model = Weights(dtype)
    ours = average.Average(full("train.ema={enabled: true, device: cpu}"), model)
    ours.values["weight"].copy_(torch.randn(7, 5) / 3)
    weight, mean = model.weight.detach().clone(), ours.values["weight"].clone()
    with ours.in_place():
        assert torch.equal(model.weight, mean.to(dtype))
        assert not torch.equal(model.weight, weight)
    assert torch.equal(model.weight, weight) and torch.equal(ours.values["weight"], mean)


def test_decay_is_of_a_step_and_the_first_update_copies(full: Callable[..., Config]) -> None:
    model = Weights()
    ours = average.Average(full("train.ema={enabled: true, decay: 0.5, start_step: 4, every: 3}"), model)
    expected = torch.zeros(7, 5, dtype=torch.float64)
    for step in range(1, 14):
        with torch.no_grad():
            model.weight.copy_(torch.randn(7, 5))
        if ours.is_due(step):
            ours.take()
        if step in (4, 7, 10, 13):
            kept = {4: 0.0, 7: 0.125, 10: 0.125, 13: 0.125}[step]
            expected = kept * expected + (1 - kept) * model.weight.detach().double()
    assert ours.updates == 4
    torch.testing.assert_close(ours.values["weight"].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def held_out(tmp_path: Path, write_pairs: Callable[..., Path]) -> Path:
    return write_pairs(tmp_path / "held out", [(64, 64)], seed=9)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_with_one(mode: str, configure: Configure, held_out: Path) -> None:
    """It is what the saved weights say, it is validated, and a resume goes on with it; the weights do not notice."""
    options = ["train.max_train_steps=3", "train.checkpointing_steps=1"]
    options += ["model.lora=null", "optimizer.init_args.lr=0.001"] if mode == "full" else []
    plain = train(configure("FluxKontext", *options, "logging.tracker_project_name=plain"))
    options += [EMA, *([rounds(held_out, 3)] if mode == "lora" else [])]
    run = train(configure("FluxKontext", *options))
    assert run is not None
    assert_equal(exact(saved(plain, 3)), exact(saved(run, 3)))

    first, last = exact(saved(run, 1)), exact(saved(run, 3))
    assert_equal(exact(saved(run, 1) / "ema"), first)
    for name, value in exact(saved(run, 3) / "ema").items():
        expected = first[name].double() * 2 / 11 + last[name].double() * 9 / 11
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)

    mean = run.parent / "mean"
    assert main(["average", str(run), "--last", "2", "--decay", "0.5", "--output", str(mean)]) == 0
    names = [str(path.relative_to(mean)) for path in mean.rglob("*.safetensors")]
    assert names == [LORA_WEIGHTS if mode == "lora" else "transformer/diffusion_pytorch_model.safetensors"]
    whole = [load_file(saved(run, step) / names[0]) if mode == "lora" else exact(saved(run, step)) for step in (2, 3)]
    for name, value in load_file(mean / names[0]).items():
        expected = (whole[0][name].double() + 2 * whole[1][name].double()) / 3
        assert torch.equal(value, expected.float() if mode == "lora" else halves(expected.float())[0])

    again = [*options, f"train.resume_from_checkpoint={saved(run, 2)}", "logging.tracker_project_name=again"]
    resumed = train(configure("FluxKontext", *again))
    for folder in ("", "ema"):
        assert_equal(exact(saved(resumed, 3) / folder), exact(saved(run, 3) / folder))
    if mode == "lora":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        both = [(line["held_out_loss"], line["held_out_loss_average"]) for line in lines if "held_out_loss" in line]
        assert len(both) == 3 and both[0][0] == both[0][1] and both[2][0] != both[2][1]
        parts = [part["name"] for part in json.loads((run / "samples/step-3/layout.json").read_text())[0]["parts"]]
        assert parts == ["reference", "base", "drawn", "averaged", "truth"]
        file = load_file(saved(run, 3) / "ema" / "pytorch_lora_weights.safetensors")  # for users
        assert file.keys() == load_file(saved(run, 3) / "pytorch_lora_weights.safetensors").keys()
    else:
        from diffusers import FluxTransformer2DModel

        loaded = FluxTransformer2DModel.from_pretrained(saved(run, 3) / "ema" / "transformer")
        mean = {name: halves(value)[0] for name, value in exact(saved(run, 3) / "ema").items()}
        assert_equal({name: value.bfloat16() for name, value in loaded.state_dict().items()}, mean)


def test_refusals_of_an_average(tmp_path: Path) -> None:
    def checkpoint(name: str, rows: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file({"transformer.a.lora_A.weight": torch.ones(rows, 3)}, folder / LORA_WEIGHTS)
        return folder

    one, other = checkpoint("one", 2), checkpoint("other", 4)
    with pytest.raises(AverageError, match="a mean is of two or more"):
        average_checkpoints(Request((one,), tmp_path / "mean"))
    with pytest.raises(AverageError, match="other tensors or other shapes"):
        average_checkpoints(Request((one, other), tmp_path / "mean"))
    with pytest.raises(AverageError, match="is no checkpoint"):
        average_checkpoints(Request((one, tmp_path), tmp_path / "mean"))
    assert not (tmp_path / "mean").exists()


def test_the_plan_counts_it(configure: Configure) -> None:
    config = configure("FluxKontext", "train.ema.enabled=true")
    estimator = Estimator(get_family("FluxKontext"), config, Path(config.model.pretrained_model_name_or_path))
    found = estimator.estimate()
    assert found.device[AVERAGE] == 4 * estimator.footprint.adapter and AVERAGE not in found.host
    waiting = config.model_copy(
        update={"train": config.train.model_copy(update={"ema": config.train.ema.model_copy(update={"device": "cpu"})})}
    )
    found = estimator.estimate(waiting)
    assert found.host[AVERAGE] == 4 * estimator.footprint.adapter and AVERAGE not in found.device
