"""The three records that travel through the system: Example -> Encoded -> Batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor, device, dtype


Extent = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Example:
    """One row of a dataset: pixels in, pixels wanted. Pictures are upright RGB, already cropped.

    References stay at their own size, with the size the VAE sees beside them: some families show the text encoder
    another size of the same picture, and a picture must never be resized twice.
    """

    key: str
    prompt: str
    references: tuple[Image, ...]
    reference_sizes: tuple[Extent, ...]  # for the VAE, one per reference
    target: Image  # at its final size
    mask: Image | None = None  # mode L, size of the target; white is foreground
    area: int | None = None  # in pixels, that its pictures are brought to; None is the model's own


@dataclass(frozen=True)
class Encoded:
    """One row after the frozen encoders: what the store keeps."""

    key: str
    target: Tensor  # (C, H, W), normalised latent
    references: tuple[Tensor, ...]  # each (C, h, w); sizes may differ
    text: dict[str, Tensor]  # the family's own names, (T, D) or (D,)
    mask: Tensor | None = None  # (H, W) in [0, 1], share of foreground under each latent cell

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in one order."""
        masks = () if self.mask is None else (self.mask,)
        return self.target, *self.references, *self.text.values(), *masks


@dataclass(frozen=True)
class Batch:
    """Encoded rows of one geometry, stacked on a first axis B."""

    keys: tuple[str, ...]
    target: Tensor  # (B, C, H, W)
    references: tuple[Tensor, ...]  # each (B, C, h, w)
    text: dict[str, Tensor]  # (B, T, D), zero-padded to the longest row, or (B, D)
    text_masks: dict[str, Tensor] = field(
        default_factory=dict
    )  # (B, T) int64, 1 for real tokens, by the names of embeddings with padded rows
    mask: Tensor | None = None  # (B, H, W)

    def to(self, device: device | str, dtype: dtype | None = None) -> Batch:
        """The same batch on `device`; floating tensors in `dtype` when given, masks as they are."""

        def move(tensor: Tensor) -> Tensor:
            wanted = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=wanted, non_blocking=True)

        return Batch(
            keys=self.keys,
            target=move(self.target),
            references=tuple(move(reference) for reference in self.references),
            text={name: move(tensor) for name, tensor in self.text.items()},
            text_masks={name: mask.to(device) for name, mask in self.text_masks.items()},
            mask=None if self.mask is None else self.mask.to(device),
        )


def collate(rows: list[Encoded]) -> Batch:
    """Stack rows of one geometry; token sequences of unequal length are zero-padded and masked.

    A single row is not copied: the batch shares its memory.

    Raises:
        ValueError: the rows differ in the shape of their target or references.
    """
    if len(rows) == 1:
        return _alone(rows[0])
    batch, places = laid_out(rows)
    for row, place in zip(rows, places, strict=True):
        for tensor, room in zip(row.tensors(), place.tensors(), strict=True):
            room.copy_(tensor)
    return batch


def laid_out(rows: Sequence[Encoded]) -> tuple[Batch, list[Encoded]]:
    """Memory for the batch of some rows, and each row's place in it, contiguous, yet to be filled.

    What belongs to no row is filled: tokens beyond a shorter sequence with zeros, masks of rows without one with ones
    (such a row counts as foreground everywhere).

    Args:
        rows: of one geometry. Only shapes, dtypes and devices are looked at; for meta tensors the memory is the CPU's.

    Raises:
        ValueError: the rows differ in the shape of their target or references.
    """
    import torch

    first = rows[0]
    for row in rows[1:]:
        shapes = [tensor.shape for tensor in (row.target, *row.references)]
        expected = [tensor.shape for tensor in (first.target, *first.references)]
        if shapes != expected:
            raise ValueError(f"a batch holds one geometry: {first.key} has {expected}, {row.key} has {shapes}")

    def room(*shape: int, like: Tensor) -> Tensor:
        whole = (len(rows), *shape)
        if like.is_meta or like.is_cpu:
            return memory(whole, like.dtype)
        return torch.empty(whole, dtype=like.dtype, device=like.device)

    target = room(*first.target.shape, like=first.target)
    references = tuple(room(*tensor.shape, like=tensor) for tensor in first.references)
    text: dict[str, Tensor] = {}
    text_masks: dict[str, Tensor] = {}
    text_places: list[dict[str, Tensor]] = [{} for _ in rows]
    for name, tensor in first.text.items():
        if tensor.ndim == 1:
            text[name] = room(*tensor.shape, like=tensor)
            lengths = [len(tensor)] * len(rows)
        else:
            lengths = [len(row.text[name]) for row in rows]
            text[name] = room(max(lengths), *tensor.shape[1:], like=tensor)
        if min(lengths) < max(lengths):
            text_masks[name] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        for place, whole, length in zip(text_places, text[name], lengths, strict=True):
            place[name] = whole[:length]
            whole[length:].zero_()

    masked = any(row.mask is not None for row in rows)
    mask = torch.ones(len(rows), *first.target.shape[1:]) if masked else None
    batch = Batch(tuple(row.key for row in rows), target, references, text, text_masks, mask)
    return batch, [
        Encoded(
            key=row.key,
            target=target[index],
            references=tuple(reference[index] for reference in references),
            text=text_places[index],
            mask=None if mask is None or row.mask is None else mask[index],
        )
        for index, row in enumerate(rows)
    ]


def _alone(row: Encoded) -> Batch:
    """The batch of one row, in its memory."""
    return Batch(
        keys=(row.key,),
        target=row.target[None],
        references=tuple(reference[None] for reference in row.references),
        text={name: tensor[None] for name, tensor in row.text.items()},
        mask=None if row.mask is None else row.mask[None],
    )


def memory(shape: Sequence[int], dtype: dtype) -> Tensor:
    """A contiguous tensor on the CPU, not filled.

    NumPy asks for huge pages where an array is large; page by page, the first touch costs more than reading a file.
    """
    import numpy as np
    import torch

    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(tuple(shape))


def joined(first: Batch, second: Batch) -> Batch:
    """The rows of two batches of one geometry, without edit masks, as one."""
    import torch
    from torch.nn.functional import pad

    text: dict[str, Tensor] = {}
    text_masks: dict[str, Tensor] = {}
    for name in first.text:
        parts = [first.text[name], second.text[name]]
        if parts[0].ndim == 2:
            text[name] = torch.cat(parts)
            continue
        masks = [
            batch.text_masks.get(name, torch.ones(part.shape[:2], dtype=torch.int64, device=part.device))
            for batch, part in zip((first, second), parts, strict=True)
        ]
        lengths = [part.shape[1] for part in parts]
        missing = [max(lengths) - length for length in lengths]
        text[name] = torch.cat([pad(part, (0, 0, 0, more)) for part, more in zip(parts, missing, strict=True)])
        mask = torch.cat([pad(part, (0, more)) for part, more in zip(masks, missing, strict=True)])
        if not bool(mask.all()):
            text_masks[name] = mask
    return Batch(
        keys=first.keys + second.keys,
        target=torch.cat([first.target, second.target]),
        references=tuple(map(torch.cat, zip(first.references, second.references, strict=True))),
        text=text,
        text_masks=text_masks,
    )
