"""The timestep reaches its embedding in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.footprint import stand_in
from qwen_image_finetune.levers.timestep import keep_timestep_exact
from qwen_image_finetune.records import Batch
from tests.kin import EDITING


def predicted(family: Any, transformer: Any, timestep: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    empty = stand_in(family, transformer.config, [(64, 64), (96, 64)], rows=1, text_tokens=5)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(transformer.dtype)

    text = {name: drawn(tensor) for name, tensor in empty.text.items()}
    batch = Batch(("a",), drawn(empty.target), tuple(drawn(reference) for reference in empty.references), text)
    guidance = 1.0 if family.distilled_guidance(transformer.config) else None
    with torch.no_grad():
        return family.velocity(transformer, batch.target, torch.tensor([timestep]), batch, guidance).float()


@pytest.mark.parametrize("name", EDITING)
def test_levels_that_bfloat16_cannot_tell_apart_are_told_apart(name: str, tiny_checkpoints: dict[str, Path]) -> None:
    family = get_family(name)
    low, high = 0.9610, 0.9620  # both round to 0.9609 in bfloat16
    assert torch.tensor(low).bfloat16() == torch.tensor(high).bfloat16()
    transformer = family.transformer.from_pretrained(tiny_checkpoints[name], subfolder="transformer").bfloat16()
    rounds = not family.scheduler_levels  # what is told in float32 already goes as it is
    assert torch.equal(predicted(family, transformer, low), predicted(family, transformer, high)) == rounds
    keep_timestep_exact(transformer)
    assert not torch.equal(predicted(family, transformer, low), predicted(family, transformer, high))


@pytest.mark.parametrize("name", EDITING)
def test_in_float32_nothing_changes(name: str, tiny_checkpoints: dict[str, Path]) -> None:
    family = get_family(name)
    transformer = family.transformer.from_pretrained(tiny_checkpoints[name], subfolder="transformer")
    before = predicted(family, transformer, 0.9615)
    keep_timestep_exact(transformer)
    assert torch.equal(predicted(family, transformer, 0.9615), before)
