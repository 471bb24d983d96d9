"""The three records that travel through the system: Example -> Encoded -> Batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor, device, dtype


@dataclass(frozen=True)
class Example:
    """One row of a dataset: pixels in, pixels wanted. Pictures are upright RGB, already cropped.

    References stay at their own size, with the size the VAE sees beside them: some families show the text encoder
    another size of the same picture, and a picture must never be resized twice.
    """

    key: str
    prompt: str
    references: tuple[Image, ...]
    reference_sizes: tuple[tuple[int, int], ...]  # (width, height) for the VAE, one per reference
    target: Image  # at its final size
    mask: Image | None = None  # mode L, size of the target; white is foreground


@dataclass(frozen=True)
class Encoded:
    """One row after the frozen encoders: what the store keeps."""

    key: str
    target: Tensor  # (C, H, W), normalised latent
    references: tuple[Tensor, ...]  # each (C, h, w); sizes may differ
    text: dict[str, Tensor]  # the family's own names, (T, D) or (D,)
    mask: Tensor | None = None  # (H, W) in [0, 1], share of foreground under each latent cell


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

    A single row is not copied, nor are rows that already lie one after the other: the batch shares their memory.

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

    text: dict[str, Tensor] = {}
    text_masks: dict[str, Tensor] = {}
    for name, tensor in first.text.items():
        tensors = [row.text[name] for row in rows]
        if tensor.ndim == 1:
            text[name] = _stacked(tensors)
            continue
        lengths = torch.tensor([len(tokens) for tokens in tensors])
        if lengths.min() == lengths.max():
            text[name] = _stacked(tensors)
        else:
            text[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            text_masks[name] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()

    masks = [row.mask for row in rows if row.mask is not None]
    if masks and len(masks) < len(rows):  # a row without an edit mask counts as foreground everywhere
        masks = [torch.ones(row.target.shape[1:]) if row.mask is None else row.mask for row in rows]
    return Batch(
        keys=tuple(row.key for row in rows),
        target=_stacked([row.target for row in rows]),
        references=tuple(_stacked(column) for column in zip(*(row.references for row in rows), strict=True)),
        text=text,
        text_masks=text_masks,
        mask=_stacked(masks) if masks else None,
    )


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


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    first = tensors[0]
    storage, size = first.untyped_storage().data_ptr(), first.numel()
    in_place = all(
        tensor.is_contiguous()
        and (tensor.shape, tensor.dtype) == (first.shape, first.dtype)
        and tensor.untyped_storage().data_ptr() == storage
        and tensor.storage_offset() == first.storage_offset() + number * size
        for number, tensor in enumerate(tensors)
    )
    if not in_place:
        return torch.stack(tuple(tensors))
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))
