"""A batch as a transformer reads it: latents as tokens and back, and rows of which each is read alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen_image_finetune.records import Batch


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C), channels of a token in the order (c, row, column)."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack` for a latent of `height` x `width`."""
    batch, _, channels = tokens.shape
    tokens = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(batch, channels // 4, height, width)


def concatenate_tokens(noisy: Tensor, references: Sequence[Tensor]) -> Tensor:
    """The image sequence [noisy target | reference 1 | ...], each (B, C, H, W) packed: (B, tokens, 4 C)."""
    return torch.cat([pack(noisy), *(pack(reference.to(noisy.dtype)) for reference in references)], dim=1)


def one_by_one(noisy: Tensor, timestep: Tensor, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Batch]]:
    """Each row of (noisy, timestep, batch) by itself, with a first axis of one: its texts without padding.

    For transformers that have no mask for the padding of a text, as their pipelines need none. A batch has as many
    calls whatever it holds, so that processes that share the weights stay in step.
    """
    lengths = {name: mask.sum(dim=1).tolist() for name, mask in batch.text_masks.items()}
    for row in range(len(noisy)):
        one = slice(row, row + 1)
        alone = Batch(
            keys=batch.keys[one],
            target=batch.target[one],
            references=tuple(reference[one].to(noisy.dtype) for reference in batch.references),
            text={
                name: text[one, : lengths[name][row]] if name in lengths else text[one]
                for name, text in batch.text.items()
            },
        )
        yield noisy[one], timestep[one], alone
