"""Rotary position embeddings in real numbers, where blocks are compiled.

diffusers turns the queries and keys of Qwen-Image as complex numbers, for which torch's compiler has no code: each turn
leaves the compiled kernels, and float32 copies of its input and output go through memory. Written in real numbers the
same products are part of the kernel that normalises queries and keys before. Eager code stays as it is: there the
complex product is one kernel and the real one is six.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

_as_published = transformer_qwenimage.apply_rotary_emb_qwen


def use_real_rotation() -> None:
    """Let everything that is compiled from now on turn in real numbers."""
    transformer_qwenimage.apply_rotary_emb_qwen = _rotated


def rotated(states: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys, turned in float32 by their positions.

    Args:
        states: (B, S, H, D), any float dtype; D/2 pairs, (real, imaginary).
        turns: (S, D/2) complex64 of absolute value 1 (Su et al. 2021, RoFormer, equation 34).

    Returns:
        (B, S, H, D) in the dtype of `states`.
    """
    pairs = states.unflatten(-1, (-1, 2))
    cosine, sine = torch.view_as_real(turns)[:, None].split(1, dim=-1)  # (S, 1, D/2, 1)
    signs = torch.arange(-1, 2, 2, device=states.device)  # -1, 1
    # Real and imaginary part side by side, and never joined: joining what was computed apart can cost a copy.
    turned = pairs.float() * cosine + pairs.flip(-1).float() * (sine * signs)
    return turned.flatten(-2).type_as(states)


def _rotated(x: Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1) -> Any:
    """In place of diffusers' function, with its names."""
    if not use_real and torch.compiler.is_compiling():
        return rotated(x, freqs_cis)
    return _as_published(x, freqs_cis, use_real, use_real_unbind_dim)
