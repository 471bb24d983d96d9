"""The table of settings that exclude each other, walked."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_image_finetune.config import ConfigError, load_config
from qwen_image_finetune.config.exclusions import EXCLUSIONS, Exclusion, Setting
from qwen_image_finetune.config.words import known_keys

# What else a setting needs so that it is refused for the pair alone.
NEEDS = {
    "train.blocks_to_swap": ("train.gradient_checkpointing=true",),
    "train.weight_precision": ("model.lora=null",),
    "train.release_gradients": ("model.lora=null", "train.max_grad_norm=null"),
}


def problems(folder: Path, *overrides: str) -> str:
    path = folder / "run.yaml"
    path.write_text("model: {pretrained_model_name_or_path: Qwen/Qwen-Image-Edit}\n", encoding="utf-8")
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def setting(one: Setting) -> tuple[str, ...]:
    return (*NEEDS.get(one.key, ()), *one.example)


@pytest.mark.parametrize("pair", EXCLUSIONS, ids=lambda pair: f"{pair.first.key}-{pair.second.key}")
def test_every_pair_is_refused_and_each_of_it_is_not(pair: Exclusion, tmp_path: Path) -> None:
    assert {pair.first.key, pair.second.key} <= known_keys().keys()
    both = problems(tmp_path, *setting(pair.first), *setting(pair.second))
    assert f"{pair.first.key}" in both
    assert f"{pair.second.key}" in both
    assert both.count("exclude each other") == 1
    assert pair.why in both
    assert not problems(tmp_path, *setting(pair.first))
    assert not problems(tmp_path, *setting(pair.second))
