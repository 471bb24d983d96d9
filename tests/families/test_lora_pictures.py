"""A picture with a LoRA: ours, and that of the family's own pipeline with the file loaded by diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qwen_image_finetune.config import Config, LoraConfig
from qwen_image_finetune.disk.versions import LORA_WEIGHTS
from qwen_image_finetune.drawing.predict import Predictor
from qwen_image_finetune.families import FAMILIES, get_family, with_targets
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora import files as lora_files
from tests.families.test_conditioning import AREA, GUIDANCE, PROMPT, picture, run_pipeline
from tests.kin import EDITING


def adapter_of(family: Family) -> LoraConfig:
    """The adapter that a run of the family has."""
    model = {"pretrained_model_name_or_path": family.published[0].name, "lora": {"r": 4, "lora_alpha": 8}}
    lora = with_targets(Config.model_validate({"model": model}), family).model.lora
    assert lora is not None
    return lora


def load_elsewhere(pipe: Any, file: Path) -> None:
    """A file of ours into a pipeline by diffusers' own loader; by peft where diffusers has none for the pipeline."""
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(file)
        return
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["lora_adapter_metadata"])
    fields = {key.removeprefix("transformer."): value for key, value in about.items()}
    peft.inject_adapter_in_model(peft.LoraConfig(**fields), pipe.transformer)
    state = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    result = peft.set_peft_model_state_dict(pipe.transformer, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_pipeline_draws_our_picture_with_our_file(
    name: str, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from qwen_image_finetune import loading

    family, folder = get_family(name), tiny_checkpoints[name]
    size = [side // family.side_multiple * family.side_multiple for side in (80, 176)]
    pipe = family.pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = [picture(333, 777)][: family.max_references]
    without = run_pipeline(family, pipe, images, *size)

    # A LoRA that does something, written as training writes it
    config = adapter_of(family)
    trained = family.transformer.from_pretrained(folder, subfolder="transformer")
    adapters.add_adapter(trained, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    lora_files.save_lora(tmp_path / LORA_WEIGHTS, trained, config, {})

    transformer = family.transformer.from_pretrained(folder, subfolder="transformer")
    lora_files.load_lora(transformer, tmp_path, family.naming)
    predictor = Predictor(family, pipe, transformer, loading.load_scheduler(folder), AREA)
    ours = predictor.predict(images, PROMPT, 2, guidance_scale=GUIDANCE, width=size[0], height=size[1], seed=7)[0]

    load_elsewhere(pipe, tmp_path / LORA_WEIGHTS)
    theirs = run_pipeline(family, pipe, images, *size)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert not np.array_equal(np.asarray(theirs), np.asarray(without)), "the LoRA must show"


@pytest.mark.parametrize("name", EDITING)
def test_in_bfloat16_too(name: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Through the class that users call, in the precision of a GPU."""
    from qwen_image_finetune.trainer import Trainer

    family, folder = get_family(name), tiny_checkpoints[name]
    trained = family.transformer.from_pretrained(folder, subfolder="transformer")
    config = adapter_of(family)
    adapters.add_adapter(trained, config, seed=0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    lora_files.save_lora(tmp_path / LORA_WEIGHTS, trained, config, {})

    trainer = Trainer(Config.model_validate({"model": {"pretrained_model_name_or_path": str(folder)}}))
    trainer.load_lora(tmp_path)
    trainer.setup_predict()
    assert trainer._predictor is not None
    trainer._predictor.area = AREA
    ours = trainer.predict(picture(128, 96), PROMPT, 2, guidance_scale=GUIDANCE, width=128, height=96, seed=7)[0]

    pipe = family.pipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    load_elsewhere(pipe, tmp_path / LORA_WEIGHTS)
    theirs = run_pipeline(family, pipe, [picture(128, 96)], 128, 96)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
