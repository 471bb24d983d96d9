"""Rotary embeddings in real numbers: what diffusers computes with complex ones, and nothing complex to compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

from qwen_image_finetune.levers.rotation import rotated, use_real_rotation

as_published = transformer_qwenimage.apply_rotary_emb_qwen


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries (2, 7, 3, 16) and the turns (7, 8) of as many positions."""
    generator = torch.Generator().manual_seed(1)
    angles = 100 * torch.randn(7, 8, generator=generator)
    states = torch.randn(2, 7, 3, 16, generator=generator, dtype=torch.float64).to(dtype)
    return states.requires_grad_(), torch.polar(torch.ones_like(angles), angles)


def exactly(states: Tensor, turns: Tensor) -> Tensor:
    """In complex128."""
    pairs = torch.view_as_complex(states.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns.to(torch.complex128)[:, None]).flatten(-2)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8)])
def test_output_and_gradient_are_those_of_complex_numbers(dtype: torch.dtype, rounding: float) -> None:
    (states, turns), gradient = drawn(dtype), drawn(dtype)[0].detach().flip(0)
    expected = exactly(states.detach(), turns)
    error = (rotated(states, turns).double() - expected).abs().max()
    assert error <= 2 * rounding * expected.abs().max()
    theirs: Any = as_published(states, turns, use_real=False)
    assert error <= (theirs.double() - expected).abs().max() + rounding * expected.abs().max()
    rotated(states, turns).backward(gradient)
    back = exactly(gradient, turns.conj())
    assert states.grad is not None
    assert (states.grad.double() - back).abs().max() <= 2 * rounding * back.abs().max()


def test_only_what_is_compiled_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_qwenimage, "apply_rotary_emb_qwen", as_published)
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph.code)
        return graph.forward

    def turned(states: Tensor, turns: Tensor) -> Any:
        return transformer_qwenimage.apply_rotary_emb_qwen(states, turns, use_real=False)

    states, turns = drawn(torch.bfloat16)
    use_real_rotation()
    assert torch.equal(turned(states, turns), as_published(states, turns, use_real=False))
    torch.testing.assert_close(torch.compile(turned, backend=look)(states, turns), turned(states, turns))
    assert seen and "view_as_complex" not in "".join(seen)
    torch._dynamo.reset()
