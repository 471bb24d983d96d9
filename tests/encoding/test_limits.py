"""What a family's encoders cannot take is refused by name, while only tokenizers are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from qwen_image_finetune import loading
from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.encoding.limits import prompt_faults, reference_faults
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family, text_tokenizer

SQUARE = (64, 64)
SHOWN = [(SQUARE, SQUARE)]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return get_family(request.param)


@pytest.fixture(scope="module")
def pipe(family: Family, tiny_checkpoints: dict[str, Path]) -> DiffusionPipeline:
    return loading.load_tokenizers(family, tiny_checkpoints[family.name])


def test_only_tokenizers_are_loaded(pipe: DiffusionPipeline) -> None:
    assert not any(isinstance(part, torch.nn.Module) for part in pipe.components.values())


def test_control_tokens_of_every_tokenizer_are_named(family: Family, pipe: DiffusionPipeline) -> None:
    assert prompt_faults(family, pipe, "a < b | c", SQUARE, SHOWN)[0] == []
    for name in (name for name in family.text_components if name.startswith("tokenizer")):
        tokenizer = text_tokenizer(pipe.components[name])
        for word in tokenizer.all_special_tokens:
            if word == tokenizer.unk_token:
                continue
            (fault,), _ = prompt_faults(family, pipe, f"red {word} hat", SQUARE, SHOWN)
            assert word in fault and "control token" in fault


def test_half_a_character_is_no_text(family: Family, pipe: DiffusionPipeline) -> None:
    assert "half a character" in prompt_faults(family, pipe, "caf\udce9", SQUARE, SHOWN)[0][0]


def test_a_prompt_longer_than_is_read_is_refused_or_said_to_be_cut(family: Family, pipe: DiffusionPipeline) -> None:
    room = family.room(pipe, SQUARE, SHOWN)
    if room is None:
        return
    word = "a "
    assert prompt_faults(family, pipe, word * (room.tokens // 4), SQUARE, SHOWN) == ([], None)
    faults, read = prompt_faults(family, pipe, word * 2 * room.tokens, SQUARE, SHOWN)
    assert bool(faults) != bool(read) and room.cut == bool(read)
    assert f"reads {room.tokens}" in faults[0] if faults else f"the first {room.tokens} are read" in str(read)


def test_slivers_are_refused_where_the_language_model_refuses_them() -> None:
    for name, picture, seen in (
        ("QwenImageEdit", (20000, 1), (9056, 32)),
        ("QwenImageEditPlus", (20000, 1), (64, 64)),
    ):
        ((place, fault),) = reference_faults(get_family(name), [(picture, seen)])
        assert place == 0 and "20000 x 1 pixels are too long and narrow" in fault
        assert list(reference_faults(get_family(name), [((3000, 300), (192, 32))])) == []
    assert list(reference_faults(get_family("FluxKontext"), [((20000, 1), (9040, 16))])) == []
