"""What is particular about FLUX.2, beside what every family goes through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config, LoraConfig
from qwen_image_finetune.drawing.predict import Predictor
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Asked, Family
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.export import export
from qwen_image_finetune.lora.files import save_lora
from qwen_image_finetune.training.train import train
from tests.families.test_conditioning import assert_same_calls, calls_of, picture

KLEIN = get_family("Flux2Klein")


@pytest.fixture(scope="module")
def klein(tiny_checkpoints: dict[str, Path]) -> DiffusionPipeline:
    pipe = KLEIN.pipeline.from_pretrained(tiny_checkpoints["Flux2Klein"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def distilled(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "klein"
    shutil.copytree(tiny_checkpoints["Flux2Klein"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    return folder


def lora_file(family: Family, checkpoint: Path, folder: Path, targets: Any, seed: int = 0) -> tuple[Path, Any]:
    """A LoRA whose alpha is its rank, as training writes it, and the transformer it was taken from."""
    model: Any = family.transformer.from_pretrained(checkpoint, subfolder="transformer")
    config = LoraConfig(r=3, lora_alpha=3, target_modules=targets)
    adapters.add_adapter(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_lora(folder / "lora.safetensors", model, config, {})
    return folder / "lora.safetensors", model


def changes(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight."""
    return {module: layer.delta() for module, layer in adapters.adapter_layers(model, name).items()}


# Levels


@pytest.mark.parametrize("tokens,steps,mu", [(4096, 50, 2.0234), (4096, 28, 2.1514), (1024, 50, 1.7020)])
def test_the_shift_is_that_of_the_authors(tokens: int, steps: int, mu: float) -> None:
    assert KLEIN.mu(tokens, {}, steps) == pytest.approx(mu, abs=5e-5)
    assert KLEIN.tokens(KLEIN.latent_shape(1024, 1024, {"in_channels": 128})) == 4096  # not a quarter of them


# Pictures


def test_a_picture_above_a_megapixel_is_seen_as_the_pipeline_sees_it(klein: DiffusionPipeline) -> None:
    """Scaled first, then cut; without a size of ours, so by the pipeline's own rule to the last pixel."""
    image, predictor = picture(1031, 1020), Predictor(KLEIN, klein, klein.transformer, klein.scheduler)
    with calls_of(klein.transformer, first=True) as theirs:
        klein(
            image=image, prompt="a hat", width=64, height=64, num_inference_steps=1, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), max_sequence_length=klein.tokenizer.model_max_length,
        )  # fmt: skip
    with calls_of(klein.transformer, first=True) as ours:
        predictor.predict(image, "a hat", 1, guidance_scale=1.0, width=64, height=64)
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("extent,size,scaled", [
    ((1000, 700), (992, 688), (1000, 700)),  # nothing is resized
    ((2048, 2048), (1024, 1024), (1024, 1024)),
    ((1000, 700), (512, 512), (731, 512)),  # another size than its own: covered
])  # fmt: skip
def test_what_is_cut_off(extent: tuple[int, int], size: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert KLEIN.scaled(extent, size) == scaled
    if scaled != (731, 512):
        assert KLEIN.size(*extent) == size


# Prompts


@pytest.mark.parametrize("name", ["Flux2", "Flux2Klein"])
def test_a_prompt_that_has_room_is_read_to_its_end(name: str, tiny_checkpoints: dict[str, Path]) -> None:
    """Its last word still counts where it just fits, and the closing words behind it; of a longer one they are lost."""
    family = get_family(name)
    pipe = family.pipeline.from_pretrained(tiny_checkpoints[name])
    room = family.room(pipe, (64, 64), [])
    assert room is not None and room.cut
    for length, whole in ((room.tokens, True), (family.prompt_length(pipe) + 8, False)):
        prompts = [" ".join(["a"] * (length - 1) + [last]) for last in ("a", "hat")]
        assert [len(family.prompt_tokens(pipe, prompt)) for prompt in prompts] == [length, length]
        one, other = (family.encode_text(pipe, prompt)["prompt_embeds"] for prompt in prompts)
        assert torch.equal(one, other) != whole
        assert len(one) == family.prompt_length(pipe)


# Distilled checkpoints


def test_a_distilled_checkpoint_draws_without_guidance(distilled: Path) -> None:
    pipe = KLEIN.pipeline.from_pretrained(distilled)
    pipe.set_progress_bar_config(disable=True)
    predictor = Predictor(KLEIN, pipe, pipe.transformer, pipe.scheduler, 96 * 96)
    assert predictor.defaults == (4, 1.0)
    with calls_of(pipe.transformer) as theirs:
        expected = KLEIN.oracle(
            pipe, Asked("a hat", [picture(96, 96)], (96, 96), steps=2, guidance=4.0, area=96 * 96, seed=0)
        )
    with calls_of(pipe.transformer) as ours:
        drawn = predictor.predict(picture(96, 96), "a hat", 2, guidance_scale=4.0)[0]
    assert_same_calls(ours, theirs)
    assert len(ours) == 2
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_a_distilled_checkpoint_is_named_before_it_is_trained(
    distilled: Path, configure: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("train.max_train_steps=1", f"cache.cache_dir={tmp_path / 'cache'}")
    config = configure("Flux2Klein", f"model.pretrained_model_name_or_path={distilled}", *options)
    file = tmp_path / "distilled.yaml"
    file.write_text(config.to_yaml())
    for command in (["check"], ["train", "--dry-run"]):
        assert main([*command, str(file)]) == 0
        assert f"{distilled}: this checkpoint is distilled to four steps" in capsys.readouterr().err
    train(config)
    said = capsys.readouterr().out
    assert said.index("Train on its base, FLUX.2-klein-base-4B") < said.index("lacks")  # before anything is encoded
    train(configure("Flux2Klein", "train.max_train_steps=1"))
    assert "is distilled" not in capsys.readouterr().out


# LoRAs


def test_a_lora_sits_on_every_block(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    _, model = lora_file(KLEIN, tiny_checkpoints["Flux2Klein"], tmp_path, KLEIN.adapter_targets)
    double = {f"transformer_blocks.{n}.attn.{part}" for n in (0, 1) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    single = {f"single_transformer_blocks.{n}.attn.{part}" for n in (0, 1) for part in ("to_qkv_mlp_proj", "to_out")}
    assert changes(model).keys() == double | single


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
@pytest.mark.parametrize("name", ["Flux2", "Flux2Klein"])
def test_the_authors_names_are_those_of_their_checkpoints(
    name: str, dialect: Any, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The change of every weight, under the authors' name, goes through diffusers' conversion of their checkpoints."""
    family = get_family(name)
    source, model = lora_file(family, tiny_checkpoints[name], tmp_path, "all-linear")
    export(source, tmp_path / "x.safetensors", dialect, family.naming)
    state = load_file(tmp_path / "x.safetensors")
    flat = {key.replace(".", "_"): key for key in expected_names(family)}
    down, up = ("lora_A", "lora_B") if dialect == "comfy" else ("lora_down", "lora_up")
    native = {}
    for key, lower in state.items():
        if not key.endswith(f".{down}.weight"):
            continue
        module = key.removesuffix(f".{down}.weight")
        scale = float(state[f"{module}.alpha"]) / len(lower)
        inner = (
            module.removeprefix("diffusion_model.") if dialect == "comfy" else flat[module.removeprefix("lora_unet_")]
        )
        native[f"{inner}.weight"] = scale * state[f"{module}.{up}.weight"] @ lower
    converted = convert_flux2_transformer_checkpoint_to_diffusers(native)
    expected = changes(model)
    assert converted.keys() == {f"{module}.weight" for module in expected}
    for module, delta in expected.items():
        torch.testing.assert_close(converted[f"{module}.weight"], delta, rtol=1e-5, atol=1e-5)


def expected_names(family: Family) -> list[str]:
    """The authors' names of all modules of two double and two single blocks."""
    return [name.replace("{}", number) for name in family.lora_names for number in ("0", "1")]


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
def test_diffusers_reads_the_exported_file(
    dialect: Any, klein: DiffusionPipeline, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The four targets of the double blocks, fused by their authors, and the two of the single ones."""
    source, model = lora_file(KLEIN, tiny_checkpoints["Flux2Klein"], tmp_path, KLEIN.adapter_targets)
    export(source, tmp_path / "x.safetensors", dialect, KLEIN.naming)
    state = load_file(tmp_path / "x.safetensors")
    if dialect == "comfy":  # diffusers knows no alpha there; ours is the rank, which means the same
        state = {key: tensor for key, tensor in state.items() if not key.endswith(".alpha")}
    save_file(state, tmp_path / "y.safetensors")
    klein.load_lora_weights(tmp_path / "y.safetensors", adapter_name=dialect)
    found = changes(klein.transformer, dialect)
    klein.unload_lora_weights()
    expected = changes(model)
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-5, atol=1e-5)
