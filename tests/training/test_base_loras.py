"""model.base_loras: LoRAs under the training change the base as peft and diffusers change it, in every precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import BaseLora, Config, ConfigError, ModelConfig
from qwen_image_finetune.drawing.tuned import TunedPredictor
from qwen_image_finetune.families import get_family
from qwen_image_finetune.judging.report import report
from qwen_image_finetune.levers.quantize import relative_error
from qwen_image_finetune.levers.quantized_linear import QuantizedLinear
from qwen_image_finetune.lora import files as lora_files
from qwen_image_finetune.lora.dialects import write_state
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.lora.merging import read_change
from qwen_image_finetune.lora.reading import read_lora
from qwen_image_finetune.lora.targets import linear_modules
from qwen_image_finetune.training.train import train
from tests.families.test_conditioning import AREA, GUIDANCE, PROMPT, picture, run_pipeline

Configure = Callable[..., Config]
STRENGTH = 0.7


def lora(path: Path, family_name: str, folder: Path, seed: int, size: float = 0.1, alpha: float = 8.0) -> Path:
    """A LoRA of rank 4 on every linear layer whose name ends in to_q or to_out.0, in diffusers' dialect."""
    family, generator = get_family(family_name), torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, layer in linear_modules(loading.empty_transformer(family, folder, torch.float32)).items():
        if name.endswith(("to_q", "to_out.0")):
            out, columns = layer.weight.shape
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * size
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * size
            state[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return path


@pytest.fixture
def loras(flux_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two of FLUX.1 Kontext, one of them in ComfyUI's dialect, fused matrices included."""
    family = get_family("FluxKontext")
    first = lora(tmp_path / "first.safetensors", "FluxKontext", flux_folder, 1)
    second = read_lora(lora(tmp_path / "plain.safetensors", "FluxKontext", flux_folder, 2, alpha=2.0), family.naming)
    save_file(write_state(second.layers, family.lora_names, "comfy"), tmp_path / "second.safetensors")
    return first, tmp_path / "second.safetensors"


def asked(folder: Path, *loras: Path, **keys: Any) -> ModelConfig:
    merged = [BaseLora(file=str(path), strength=STRENGTH) for path in loras]
    return ModelConfig(pretrained_model_name_or_path=str(folder), base_loras=merged, **keys)


def loaded(folder: Path, *loras: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    return loading.load_transformer(get_family("FluxKontext"), folder, dtype, asked(folder, *loras, **keys))


def newest(run: Path | None) -> Path:
    assert run is not None
    return max(run.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def test_the_weights_are_those_that_peft_merges(flux_folder: Path, loras: tuple[Path, Path]) -> None:
    family = get_family("FluxKontext")
    theirs: Any = family.transformer.from_pretrained(flux_folder / "transformer")
    before = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    for number, path in enumerate(loras):
        lora_files.load_lora(theirs, path, family.naming, adapter_name=f"lora{number}")
    names = ["lora0", "lora1"]
    theirs.set_adapters(names, [STRENGTH, STRENGTH])
    theirs.fuse_lora(adapter_names=names)
    merged = {key.replace(".base_layer.", "."): tensor for key, tensor in theirs.state_dict().items()}
    ours = loaded(flux_folder, *loras).state_dict()
    assert list(ours) == list(before)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-6, atol=1e-6)
        assert torch.equal(tensor, before[key]) == (not key.endswith(("to_q.weight", "to_out.0.weight")))
    rounded = loaded(flux_folder, *loras, dtype=torch.bfloat16).state_dict()  # a single time
    assert all(torch.equal(rounded[key], tensor.bfloat16()) for key, tensor in ours.items())


@pytest.mark.parametrize("format", ["fp8", "int8", "nf4"])
def test_a_base_that_is_quantised_while_it_is_read_is_that_of_the_merged_weights(
    format: str, flux_folder: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "merged").mkdir()
    loaded(flux_folder, *loras).save_pretrained(tmp_path / "merged" / "transformer")
    ours = loaded(flux_folder, *loras, quantize=format).state_dict()
    theirs = loaded(tmp_path / "merged", quantize=format).state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_a_base_that_came_quantised_is_quantised_again_and_what_that_costs_is_said(
    flux_folder: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    family = get_family("FluxKontext")
    state = family.transformer.from_pretrained(flux_folder / "transformer").state_dict()
    for key in [
        key for key, tensor in state.items() if tensor.ndim == 2 and key.endswith(".weight") and "blocks" in key
    ]:
        scale = state[key].abs().max() / 448
        state[key], state[f"{key.removesuffix('weight')}scale_weight"] = (
            (state[key] / scale).to(torch.float8_e4m3fn),
            scale,
        )
    save_file(state, tmp_path / "fp8.safetensors")
    model, said = asked(flux_folder, *loras, transformer_file=str(tmp_path / "fp8.safetensors")), list[str]()
    ours: Any = loading.load_transformer(family, flux_folder, torch.float32, model, say=said.append)
    plain = loaded(flux_folder, transformer_file=str(tmp_path / "fp8.safetensors"))
    change = read_change(plain, model.base_loras, family.naming)
    assert change is not None
    errors = {}
    for name, layer in ours.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        before = plain.get_submodule(name)
        if not change.touches(name):
            assert torch.equal(layer.weight, before.weight)
            continue
        exact = change.added_to(name, before.dequantised(torch.float32))
        errors[name] = relative_error(exact, layer)
        assert errors[name] < 0.03 < relative_error(exact, before)
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    assert (
        f"model.base_loras cost a second rounding of {len(errors)} layers: {mean:.1%} of their weights on average, "
        f"{errors[worst]:.1%} at worst ({worst})"
    ) in said[-1]
    assert (
        said[0] == f"merged into the base: {loras[0]} at strength {STRENGTH}, {len(change.files[0][0].layers)} layers"
    )


def test_a_process_adds_its_own_rows(flux_folder: Path, loras: tuple[Path, Path]) -> None:
    """Of a model that several share."""
    family = get_family("FluxKontext")
    change = read_change(loaded(flux_folder), asked(flux_folder, *loras).base_loras, family.naming)
    assert change is not None
    name = next(iter(change.files[0][0].layers))
    weight = loaded(flux_folder).get_submodule(name).weight
    torch.testing.assert_close(
        change.added_to(name, weight[3:9], first_row=3), change.added_to(name, weight)[3:9], rtol=1e-6, atol=1e-7
    )


def test_diffusers_draws_our_picture_with_both_loras(
    flux_folder: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    """The one under the training merged, the trained one on top, by our prediction from the run's configuration."""
    family = get_family("FluxKontext")
    trained = lora(tmp_path / "trained.safetensors", "FluxKontext", flux_folder, 3)
    model = asked(flux_folder, loras[0]).model_dump()
    resolution = {"data": {"init_args": {"resolution": round(AREA**0.5)}}}
    config = Config.model_validate({"model": model, "train": {"mixed_precision": "no"}, **resolution})
    ours = TunedPredictor(config)
    drawing = dict(num_inference_steps=2, guidance_scale=GUIDANCE, width=80, height=176, seed=7)
    base = ours.predict(picture(333, 777), PROMPT, **drawing)[0]
    ours.load_lora(trained)
    both = ours.predict(picture(333, 777), PROMPT, **drawing)[0]
    pipe: Any = family.pipeline.from_pretrained(flux_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(loras[0], adapter_name="base")
    pipe.load_lora_weights(trained, adapter_name="trained")
    for weights, drawn in (([STRENGTH, 0.0], base), ([STRENGTH, 1.0], both)):
        pipe.set_adapters(["base", "trained"], weights)
        theirs = run_pipeline(family, pipe, [picture(333, 777)], 80, 176)
        assert np.abs(np.asarray(theirs, int) - np.asarray(drawn, int)).max() <= 1
    assert np.abs(np.asarray(base, int) - np.asarray(both, int)).max() > 20


def test_a_transformer_that_was_tuned_as_a_whole_has_them_in_it(
    flux_folder: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    loaded(flux_folder, *loras).save_pretrained(tmp_path / "tuned" / "transformer")
    model = asked(flux_folder, *loras).model_dump()
    ours = TunedPredictor(Config.model_validate({"model": model, "train": {"mixed_precision": "no"}}))
    for tuned in (tmp_path / "tuned", None):  # before it is loaded, and in its place
        ours.load_transformer(tuned)
        weights = ours.predictor.transformer.state_dict()
        merged = load_file(tmp_path / "tuned" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(weights[key], tensor) for key, tensor in merged.items())


def test_a_run_on_top_of_a_lora_names_it_and_goes_on_with_no_other(
    configure: Configure, loras: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    under = f"model.base_loras=[{{file: {loras[0]}, strength: {STRENGTH}}}]"
    same = ("train.max_train_steps=2", "train.checkpointing_steps=1")
    checkpoint = newest(train(configure("FluxKontext", *same, under)))
    assert f"merged into the base: {loras[0]} at strength {STRENGTH}" in capsys.readouterr().out
    with safe_open(checkpoint / "pytorch_lora_weights.safetensors", "pt") as file:
        (about,) = json.loads(file.metadata()["qif.base_loras"])
    assert (about["file"], about["strength"], len(about["sha256"])) == (loras[0].name, STRENGTH, 64)
    on_top = newest(train(configure("FluxKontext", *same, f"model.base_loras=[{{file: {checkpoint}}}]")))
    first, second = (load_file(folder / "adapter.safetensors") for folder in (checkpoint, on_top))  # both are kept
    assert any(not torch.equal(first[key], second[key]) for key in first)
    page = report(on_top.parent, tmp_path / "report.html").read_text()
    assert escape(f'pipe.load_lora_weights("{checkpoint}", adapter_name="under_0")') in page
    assert escape('pipe.set_adapters(["under_0", "trained"], [1.0, 1.0])') in page
    for other in ("model.base_loras=[]", under.replace(str(STRENGTH), "0.5"), under.replace("first", "second")):
        with pytest.raises(ConfigError, match=r"model\.base_loras.*what was learnt belongs to that base"):
            train(configure("FluxKontext", *same, other, f"train.resume_from_checkpoint={checkpoint}"))
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run", under]) == 0
    assert f"{loras[0]} merged into it at strength {STRENGTH}" in capsys.readouterr().out


def test_a_lora_that_is_not_there_or_does_not_fit_is_refused_before_anything_loads(
    configure: Configure, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    other = lora(tmp_path / "other.safetensors", "QwenImageEdit", tiny_checkpoints["QwenImageEdit"], 1)
    with pytest.raises((ConfigError, LoraFileError), match=r"other\.safetensors"):
        train(configure("FluxKontext", f"model.base_loras=[{{file: {other}}}]"))
    with pytest.raises(ConfigError, match=r"model\.base_loras\[0\]\.file='nowhere\.safetensors'"):
        train(configure("FluxKontext", "model.base_loras=[{file: nowhere.safetensors}]"))
    with pytest.raises(ConfigError, match=r"'model\.base_loras\[0\]\.weight' is not a key"):
        configure("FluxKontext", f"model.base_loras=[{{file: {other}, weight: 1.0}}]")
