"""What is particular about FLUX 3, beside what every family goes through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers
from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from safetensors.torch import load_file

from qwen_image_finetune import levers, loading
from qwen_image_finetune.config import Config, ConfigError, LoraConfig, resolve_family
from qwen_image_finetune.data.images import fitted
from qwen_image_finetune.drawing.predict import Predictor
from qwen_image_finetune.encoding.pairs import open_pairs
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.modular import OneFolder
from qwen_image_finetune.fitting.footprint import stand_in
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.export import export
from qwen_image_finetune.lora.files import save_lora
from qwen_image_finetune.records import Encoded, collate
from qwen_image_finetune.training.job import check_references
from tests.families.test_conditioning import assert_same_calls, calls_of, picture

KLEIN = get_family("Flux3Klein")
LONG = "add a hat to the person and " * 12  # more than 80 tokens


@pytest.fixture(scope="module")
def folder(tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints["Flux3Klein"]


@pytest.fixture(scope="module")
def klein(folder: Path) -> Any:
    return KLEIN.pipeline.from_pretrained(folder)


def copied(folder: Path, target: Path, about: str = "modular_model_index.json", **changes: Any) -> Path:
    """The checkpoint with one of its files of JSON changed."""
    shutil.copytree(folder, target)
    found = json.loads((target / about).read_text())
    (target / about).write_text(json.dumps({**found, **changes}))
    return target


def config_of(folder: Path) -> Config:
    return Config.model_validate({"model": {"pretrained_model_name_or_path": str(folder)}})


# The checkpoint


def test_diffusers_loads_the_same_from_the_folder(folder: Path, klein: Any, tmp_path: Path) -> None:
    """Its own class, told of the folder, and of an index that points at the hub and asks for a rewriter of prompts."""
    index = json.loads((folder / "modular_model_index.json").read_text())
    for entry in index.values():
        if isinstance(entry, list):
            entry[-1]["pretrained_model_name_or_path"] = "black-forest-labs/flux-3-image-klein-base"
    rewriter = [None, None, {**index["text_encoder"][-1], "subfolder": "prompt_upsampler"}]
    place = copied(folder, tmp_path / "model", **{**index, "prompt_upsampler": rewriter})
    blocks = diffusers.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    theirs = blocks.init_pipeline(str(place))
    theirs.load_components(local_files_only=True)
    ours = KLEIN.pipeline.from_pretrained(place)
    assert type(theirs).__name__ == type(ours).__name__ == "Flux3ModularPipeline"
    assert ours.components.keys() == theirs.components.keys() == klein.components.keys()
    for name in ("transformer", "vae", "text_encoder"):
        state = getattr(theirs, name).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in getattr(ours, name).state_dict().items())
    assert ours.scheduler.config.shift == theirs.scheduler.config.shift == loading.load_scheduler(place).config.shift
    assert ours.scheduler.config.shift == 6.93


@pytest.mark.parametrize("entry", [
    ["os", "system", {"type_hint": ["diffusers", "AutoencoderKLFlux2"]}],
    [None, None, {"type_hint": ["evil", "Evil"]}],
], ids=["class", "type_hint"])  # fmt: skip
def test_parts_of_other_packages_are_refused(entry: Any, folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "model", vae=entry)
    for load in (
        lambda: loading.load_tokenizers(KLEIN, place),
        lambda: loading.load_encoders(KLEIN, place, torch.float32, {"default": "cpu"}),
    ):
        with pytest.raises(ConfigError, match=r"modular_model_index\.json takes vae from '(os|evil)'"):
            load()


def test_a_part_that_lies_elsewhere_is_named(folder: Path, tmp_path: Path) -> None:
    entry = [None, None, {"pretrained_model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct", "subfolder": ""}]
    place = copied(folder, tmp_path / "model", text_encoder=entry)
    shutil.rmtree(place / "text_encoder")
    with pytest.raises(ConfigError, match="text_encoder is not in it, its index takes that from Qwen/Qwen3-VL-4B"):
        loading.load_encoders(KLEIN, place, torch.float32, {"default": "cpu"})


def test_the_distilled_variant_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    named = copied(folder, tmp_path / "named", _class_name="Flux3DistilledModularPipeline")
    with pytest.raises(ConfigError, match=r"Flux3DistilledModularPipeline, which .* train on its base, black-forest"):
        resolve_family(config_of(named))
    mapped = copied(folder, tmp_path / "mapped", "transformer/config.json", flow_map=True)
    for load in (loading.load_transformer, loading.empty_transformer):
        with pytest.raises(ConfigError, match=r"flow_map=true: .* train on its base, black-forest-labs/flux-3-image"):
            load(KLEIN, mapped, torch.float32)


def test_what_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index and the parts, without weights that are not safetensors, and without the rewriter of prompts."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "qwen_image_finetune.families.modular.snapshot_download",
        lambda name, **options: asked.update(options, name=name) or "folder",
    )
    assert issubclass(KLEIN.pipeline, OneFolder)
    assert KLEIN.pipeline.download("a/b", revision="main", transformer=None) == "folder"
    wanted = asked["allow_patterns"]
    assert "modular_model_index.json" in wanted and {"vae/*.safetensors", "text_encoder/*.json"} <= set(wanted)
    assert not [files for files in wanted if files.startswith(("transformer", "prompt_upsampler"))]
    assert not [files for files in wanted if files.endswith((".py", ".bin", ".pt", "*"))]


# Pictures

EXTENTS = [(128, 96), (150, 210), (1031, 1020), (2100, 2050), (5000, 300), (40, 70), (13, 90), (2049, 2047)]


@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_pictures_are_brought_to_size_as_in_the_pipeline(extent: tuple[int, int]) -> None:
    """At the model's own areas, to the last pixel: one picture is filled, of several each is cut."""
    image, processor = picture(*(max(side, 8) for side in extent)).resize(extent), Flux3ImageProcessor()
    for mode, references in (("fill", 1), ("crop", 3)):
        if mode == "crop" and min(extent) < 16:
            continue
        theirs, about = processor.preprocess(image, resize_mode=mode)
        size = KLEIN.size(*extent, references=references)
        own = KLEIN.scaled(extent, size, references=references)
        ours = fitted(image, own, size)
        assert torch.equal(processor.normalize(processor.numpy_to_pt(processor.pil_to_numpy(ours))), theirs)
        if about["reference_crop"] is not None:
            left, upper, right, lower = about["reference_crop"]
            assert (right - left, lower - upper) == own


def test_the_picture_has_the_size_of_its_reference(klein: Any) -> None:
    """No size is asked for: the canvas is drawn, and cut back to what the reference takes of it."""
    predictor, image = (
        Predictor(KLEIN, klein, klein.transformer, klein.scheduler),
        picture(152, 88).crop((3, 2, 150, 83)),
    )
    spec = klein.get_component_spec("guider")
    klein.update_components(guider=spec.create(guidance_scale=1.0))
    with calls_of(klein.transformer) as theirs:
        expected = klein(
            prompt="a hat", image=image, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
            max_sequence_length=KLEIN.prompt_length(klein), output="images",
        )[0]  # fmt: skip
    with calls_of(klein.transformer) as ours:
        drawn = predictor.predict(image, "a hat", 2, guidance_scale=1.0)[0]
    assert_same_calls(ours, theirs)
    assert drawn.size == image.size == (147, 81)
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


# Rows


def test_rows_of_unequal_texts_and_no_references(klein: Any) -> None:
    """80 and 160 tokens in one batch."""
    generator, shape = torch.Generator().manual_seed(0), KLEIN.latent_shape(64, 96, klein.transformer.config)
    target = torch.randn(shape, generator=generator)
    rows = [Encoded(prompt, target, (), KLEIN.encode_text(klein, prompt)) for prompt in ("a hat", LONG)]
    assert [len(row.text["prompt_embeds"]) for row in rows] == [80, 160]
    both, levels = collate(rows), torch.tensor([0.3, 0.8])
    noisy = torch.stack([target, target.flip(1)])
    with torch.no_grad():
        together = KLEIN.velocity(klein.transformer, noisy, levels, both)
        for place, row in enumerate(rows):
            one = slice(place, place + 1)
            alone = KLEIN.velocity(klein.transformer, noisy[one], levels[one], collate([row]))
            assert torch.equal(together[one], alone)


def test_a_shared_model_sees_references_in_every_process_or_in_none(configure: Callable[..., Config]) -> None:
    config = configure("Flux3Klein")
    pairs = open_pairs(config, KLEIN)
    check_references(config, pairs)
    with pytest.raises(ConfigError, match="prompt_image_dropout_rate drops the references of some samples, with FSDP"):
        check_references(configure("Flux3Klein", "data.init_args.prompt_image_dropout_rate=0.1"), pairs)
    rows = pairs.training.rows
    pairs.training.rows = [*rows[:-1], replace(rows[-1], reference_names=())]
    with pytest.raises(ConfigError, match="some pairs have references, others none, with FSDP"):
        check_references(config, pairs)


def test_levers_change_no_gradient(folder: Path) -> None:
    """Recomputation, with blocks that wait in host memory: streams run in another order than the model names them."""
    found = []
    for keys in ({}, {"gradient_checkpointing": True, "blocks_to_swap": 3}):
        model: Any = loading.load_transformer(KLEIN, folder, torch.float32)
        config = Config.model_validate({
            "model": {"pretrained_model_name_or_path": str(folder), "lora": {
                "r": 2, "target_modules": list(KLEIN.adapter_targets), "init_lora_weights": "gaussian"}},
            "train": {"mixed_precision": "no", **keys},
        })  # fmt: skip
        levers.prepare(model, config, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
        batch = stand_in(KLEIN, dict(model.config), [(64, 64), (64, 96)], 2, 80).to("cpu", torch.float32)
        noisy = torch.randn(batch.target.shape, generator=generator)
        KLEIN.velocity(model, noisy, torch.tensor([0.5, 0.7]), batch).square().sum().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# LoRAs


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
def test_the_authors_names_are_those_of_their_checkpoints(
    dialect: Any, folder: Path, tmp_path: Path, klein: Any
) -> None:
    """The change of every weight, under the authors' name, goes through diffusers' conversion of their checkpoints."""
    model: Any = loading.load_transformer(KLEIN, folder, torch.float32)
    config = LoraConfig(r=3, lora_alpha=3, target_modules="all-linear")
    adapters.add_adapter(model, config, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    save_lora(tmp_path / "lora.safetensors", model, config, {})
    export(tmp_path / "lora.safetensors", tmp_path / "x.safetensors", dialect, KLEIN.naming)
    state = load_file(tmp_path / "x.safetensors")
    names = [template.replace("{}", number) for template in KLEIN.lora_names for number in "01"]
    flat = {name.replace(".", "_"): name for name in names}
    down, up = ("lora_A", "lora_B") if dialect == "comfy" else ("lora_down", "lora_up")
    native = {}
    for key, lower in state.items():
        if not key.endswith(f".{down}.weight"):
            continue
        module = key.removesuffix(f".{down}.weight")
        scale = float(state[f"{module}.alpha"]) / len(lower)
        inner = module.removeprefix("diffusion_model.")
        if dialect == "kohya":
            inner = flat[module.removeprefix("lora_unet_")]
        native[f"{inner}.weight"] = scale * state[f"{module}.{up}.weight"] @ lower
    converted = convert_flux3_transformer_checkpoint_to_diffusers(native)
    expected = {module: layer.delta() for module, layer in adapters.adapter_layers(model, "default").items()}
    assert converted.keys() == {f"{module}.weight" for module in expected}
    for module, delta in expected.items():
        torch.testing.assert_close(converted[f"{module}.weight"], delta, rtol=1e-5, atol=1e-5)


def test_a_lora_sits_on_every_block(klein: Any) -> None:
    from qwen_image_finetune.lora.targets import target_modules

    names = target_modules(klein.transformer, list(KLEIN.adapter_targets))
    places = ("mode_blocks.image.0", "mode_blocks.image_cond.0", "txt_mode_blocks.0", "single_transformer_blocks.0",
              "single_transformer_blocks.1")  # fmt: skip
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_in", "ff.linear_out")
    assert set(names) == {f"{place}.{part}" for place in places for part in parts}
