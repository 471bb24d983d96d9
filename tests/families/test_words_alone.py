"""Families that draw from words alone: what they share with their edit families, and what is particular about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.drawing.predict import PredictionError, Predictor, check_request
from qwen_image_finetune.encoding.pairs import asked, open_pairs
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Asked
from qwen_image_finetune.fitting.estimate import GIB, Estimator
from qwen_image_finetune.lora.export import export
from qwen_image_finetune.lora.files import load_lora
from qwen_image_finetune.lora.header import read_metadata
from qwen_image_finetune.trainer import Trainer
from qwen_image_finetune.training.train import train
from tests.families.test_conditioning import assert_same_calls, calls_of
from tests.families.test_flux2 import changes, lora_file
from tests.kin import WORDS_ALONE

ROOT = Path(__file__).parents[2]
SIBLINGS = {"Flux": "FluxKontext", "QwenImage": "QwenImageEdit"}
SHARED = (
    "transformer", "text_embeddings", "side_multiple", "guidance_scale", "resampling", "adapter_targets", "lora_names",
    "lora_readers", "pixels", "encode_image", "encode_text", "velocity", "decode", "guide", "scaled", "mu", "tokens",
    "latent_shape", "text_shape", "stand_in_text", "distilled_guidance",
)  # fmt: skip
Configure = Callable[..., Config]


@pytest.mark.parametrize("name", WORDS_ALONE)
def test_weights_and_code_are_those_of_a_family_that_edits(name: str, tiny_checkpoints: dict[str, Path]) -> None:
    """So the tests that take long go through that one, which is trained without references as well."""
    ours, theirs = type(get_family(name)), type(get_family(SIBLINGS[name]))
    assert [what for what in SHARED if getattr(ours, what) is not getattr(theirs, what)] == []
    here, there = tiny_checkpoints[name], tiny_checkpoints[SIBLINGS[name]]
    index = json.loads((here / "model_index.json").read_text())
    for part in (name for name, what in index.items() if isinstance(what, list) and what[0] is not None):
        files = sorted(file.relative_to(here) for file in (here / part).rglob("*"))
        assert files
        assert [file for file in files if (here / file).read_bytes() != (there / file).read_bytes()] == []


# References


@pytest.mark.parametrize("name", WORDS_ALONE)
def test_a_reference_is_refused_with_the_family_that_takes_one(
    name: str, configure: Configure, pairs: Path, tmp_path: Path
) -> None:
    family = get_family(name)
    other = rf"{name} draws from words alone and takes no control image; to edit pictures use {family.edit_family}, "
    with pytest.raises(PredictionError, match=other):
        check_request(family, ["one"], None, None)
    with pytest.raises(DataError, match=f"7 of 7 pictures have control images: {other}"):
        open_pairs(configure(name, f"data.init_args.dataset_path={pairs}"), family)
    sample = {"prompt": "a hat", "references": [str(pairs / "control_images" / "0.png")]}
    config = configure(name, f"validation={json.dumps({'enabled': True, 'steps': 1, 'samples': [sample]})}")
    with pytest.raises(DataError, match=rf"validation.samples\[0\].references: 1 pictures; {other}"):
        asked(config, family, open_pairs(config, family).training)


@pytest.mark.parametrize("name", WORDS_ALONE)
def test_a_picture_has_the_models_own_size_or_the_one_that_is_asked_for(
    name: str, configure: Configure, tmp_path: Path
) -> None:
    family = get_family(name)
    assert family.size(1, 1) == (1024, 1024)
    check_request(family, [], None, None)
    with pytest.raises(PredictionError, match=r"width=65 and height=64 must be multiples of 16"):
        check_request(family, [], 65, 64)
    trainer = Trainer(configure(name))
    assert trainer.predict(None, "a hat", 1)[0].size == (64, 64)  # at the resolution that is set
    assert trainer.predict(None, "a hat", 1, width=128, height=32)[0].size == (128, 32)
    words = ["--prompt", "a hat", "--steps", "1", "--output", str(tmp_path / "hat.png")]
    assert main(["predict", str(tmp_path / "config.yaml"), *words]) == 0
    assert Image.open(tmp_path / "hat.png").size == (64, 64)


def test_captions_alone_are_judged_without_a_copy_of_the_input(
    configure: Configure, captioned: Path, tmp_path: Path
) -> None:
    configure("QwenImage")
    words = ["--steps", "1", "--count", "1", "--guidance", "1", "--output", str(tmp_path / "judged")]
    assert main(["evaluate", str(tmp_path / "config.yaml"), str(captioned), *words]) == 0
    written = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert [one["name"] for one in written["candidates"]] == ["base"]
    assert written["candidates"][0]["means"]["psnr"]["pictures"] == 1
    assert not (tmp_path / "judged" / "input").exists()


# LoRAs


@pytest.mark.parametrize("name", WORDS_ALONE)
def test_a_lora_is_read_in_every_dialect(name: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """By us, and by diffusers' own pipeline where it takes models of any width."""
    family, folder = get_family(name), tiny_checkpoints[name]
    source, model = lora_file(family, folder, tmp_path, list(family.adapter_targets))
    expected = changes(model)
    pipe: Any = family.pipeline.from_pretrained(folder, text_encoder=None, vae=None)
    for dialect in ("comfy", "kohya"):  # in test_lora_pictures.py that of diffusers
        file = tmp_path / f"{dialect}.safetensors"
        export(source, file, dialect, family.naming)  # type: ignore[arg-type]
        empty: Any = family.transformer.from_pretrained(folder, subfolder="transformer")
        load_lora(empty, file, family.naming)
        read = {"us": changes(empty)}
        if name == "QwenImage":  # its conversion of FLUX.1 knows the full-size widths alone
            pipe.load_lora_weights(file, adapter_name=dialect)
            read["diffusers"] = changes(pipe.transformer, dialect)
        for who, found in read.items():
            assert found.keys() == expected.keys(), (who, dialect)
            for module, delta in expected.items():
                torch.testing.assert_close(found[module], delta, rtol=1e-5, atol=1e-5)


# FLUX.1 [schnell]


@pytest.fixture(scope="module")
def schnell(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as schnell's is: no guidance embedding, noise levels that are not shifted."""
    folder = tmp_path_factory.mktemp("distilled") / "schnell"
    shutil.copytree(tiny_checkpoints["Flux"], folder)
    dev = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    without = FluxTransformer2DModel.from_config({**dev.config, "guidance_embeds": False})
    without.load_state_dict({key: weight for key, weight in dev.state_dict().items() if "guidance" not in key})
    without.save_pretrained(folder / "transformer")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    about = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**about, "shift": 1.0, "use_dynamic_shifting": False}))
    return folder


def test_schnell_draws_in_four_steps_as_its_pipeline_does(schnell: Path) -> None:
    family = get_family("Flux")
    pipe: Any = family.pipeline.from_pretrained(schnell)
    pipe.set_progress_bar_config(disable=True)
    with calls_of(pipe.transformer) as theirs:
        expected = family.oracle(pipe, Asked("a hat", [], (96, 64), steps=4, guidance=0.0, area=0, seed=7))
    with calls_of(pipe.transformer) as ours:
        predictor = Predictor(family, pipe, pipe.transformer, pipe.scheduler)
        drawn = predictor.predict(None, "a hat", guidance_scale=3.5, width=96, height=64, seed=7)
    assert len(ours) == 4
    assert_same_calls(ours, theirs)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(expected))


def test_schnell_is_named_before_it_is_trained(
    schnell: Path, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("Flux", f"model.pretrained_model_name_or_path={schnell}", "train.max_train_steps=1")
    (tmp_path / "schnell.yaml").write_text(config.to_yaml())
    assert main(["check", str(tmp_path / "schnell.yaml")]) == 0
    words = f"{schnell}: this checkpoint has no guidance embedding, like FLUX.1-schnell"
    assert words in capsys.readouterr().err
    run = train(config)
    assert run is not None
    said = capsys.readouterr().out
    assert said.index("Train on FLUX.1-dev") < said.index("the cache in ")  # before anything is encoded
    about = read_metadata(next(run.glob("checkpoint-*")) / "pytorch_lora_weights.safetensors")
    assert json.loads(about["qif.sampling"]) == {"num_inference_steps": 4, "guidance_scale": 1.0}


# Configurations


@pytest.mark.parametrize("file", ["words_flux", "words_qwen_image"])
def test_the_example_fits_the_card_that_it_names(file: str) -> None:
    path = ROOT / f"configs/{file}.yaml"
    assert "on one card of 24 GB" in path.read_text()
    config = load_config(path)
    estimator = Estimator(get_family(str(config.train.trainer)), config, None)
    assert len(estimator.sizes) == 1
    assert estimator.estimate().fits(24 * GIB)
