"""Rows of the store in one batch: read to where they belong, with the bits that stacking them afterwards gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_image_finetune.encoding.cache import ReadEntry, read_stacked
from qwen_image_finetune.encoding.store import DamagedEntry, Store, entry_key
from qwen_image_finetune.records import Batch, Encoded, collate

RowsOf = Callable[[ReadEntry], list[Encoded]]
ROWS, GEOMETRY = 3, (4, 6, 5)


def stored(folder: Path, lengths: tuple[int, ...] = (7,) * ROWS, masks: tuple[int, ...] = (), wide: int = -1) -> RowsOf:
    """Rows of a target, two references of unlike sizes, and texts of two entries, as a dropped prompt mixes them."""
    store, generator = Store(folder), torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    for row, length in enumerate(lengths):
        geometry = (4, 6, 9) if row == wide else GEOMETRY
        mask = {"mask": torch.rand(geometry[1:], generator=generator)} if row in masks else {}
        store.write(entry_key(target=row), {"latent": drawn(*geometry), **mask})
        for place, shape in enumerate(((4, 3, 3), (4, 2, 8))):
            store.write(entry_key(reference=place, row=row), {"latent": drawn(*shape)})
        for kind in ("own", "other"):
            store.write(entry_key(text=kind, row=row), {"tokens": drawn(length, 8), "pooled": drawn(8)})

    def rows_of(read: ReadEntry) -> list[Encoded]:
        rows = []
        for row in range(len(lengths)):
            target, own, other = (
                read(entry_key(**names)) for names in ({"target": row}, {"text": "own", "row": row},
                                                       {"text": "other", "row": 0})
            )  # fmt: skip
            references = tuple(read(entry_key(reference=place, row=row))["latent"] for place in (0, 1))
            text = {"tokens": own["tokens"], "pooled": other["pooled"]}
            rows.append(Encoded(f"row {row}", target["latent"], references, text, target.get("mask")))
        return rows

    return rows_of


def afterwards(rows: list[Encoded]) -> Batch:
    """The same by torch's own means, out of rows in memory."""
    tokens = [row.text["tokens"] for row in rows]
    lengths = torch.tensor([len(one) for one in tokens])
    ragged = {"tokens": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
    ones = torch.ones(rows[0].target.shape[1:])
    masks = [ones if row.mask is None else row.mask for row in rows]
    return Batch(
        keys=tuple(row.key for row in rows),
        target=torch.stack([row.target for row in rows]),
        references=tuple(torch.stack([row.references[place] for row in rows]) for place in (0, 1)),
        text={
            "tokens": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
            "pooled": torch.stack([row.text["pooled"] for row in rows]),
        },
        text_masks=ragged if lengths.min() < lengths.max() else {},
        mask=torch.stack(masks) if any(row.mask is not None for row in rows) else None,
    )


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.keys, one.text.keys(), one.text_masks.keys()) == (
        other.keys,
        other.text.keys(),
        other.text_masks.keys(),
    )
    assert (one.mask is None) == (other.mask is None) and len(one.references) == len(other.references)
    pairs = [(one.target, other.target), *zip(one.references, other.references, strict=True)]
    pairs += [(tensor, other.text[name]) for name, tensor in one.text.items()]
    pairs += [(tensor, other.text_masks[name]) for name, tensor in one.text_masks.items()]
    pairs += [(one.mask, other.mask)] if one.mask is not None and other.mask is not None else []
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype and ours.is_contiguous() and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("lengths", "masks"),
    [((7, 7, 7), ()), ((7, 2, 9), ()), ((9, 0, 3), ()), ((7, 7, 7), (0, 1, 2)), ((3, 5, 5), (1,)), ((6,), (0,))],
)
def test_a_batch_has_the_bits_of_its_rows(lengths: tuple[int, ...], masks: tuple[int, ...], tmp_path: Path) -> None:
    rows_of = stored(tmp_path, lengths, masks)
    rows = rows_of(Store(tmp_path).read)
    assert_same(collate(rows), afterwards(rows))
    assert_same(read_stacked(Store(tmp_path), rows_of), afterwards(rows))


def test_a_row_alone_is_not_copied(tmp_path: Path) -> None:
    row = stored(tmp_path, (5,))(Store(tmp_path).read)[0]
    assert collate([row]).target.data_ptr() == row.target.data_ptr()


def test_rows_of_unlike_shapes_are_no_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one geometry: row 0 has .* row 1 has"):
        read_stacked(Store(tmp_path), stored(tmp_path, wide=1))


def test_every_flipped_or_missing_byte_of_an_entry_is_noticed(tmp_path: Path) -> None:
    """The shapes decide where the bytes go before the checksum is known."""
    key = entry_key(target=1)
    rows_of, store = stored(tmp_path, (2, 3), masks=(1,)), Store(tmp_path)
    expected, path = read_stacked(store, rows_of), store.path(key)
    sound = path.read_bytes()
    tensors = 8 + int.from_bytes(sound[:8], "little")
    for place in (*range(tensors), *range(tensors, len(sound), 31)):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x01]) + sound[place + 1 :])
        try:
            found = read_stacked(store, rows_of)
        except DamagedEntry as error:
            assert path.name in str(error)
        else:  # only a change that means nothing may pass
            assert_same(found, expected)
            assert place < tensors
    for length in range(0, len(sound), 13):
        path.write_bytes(sound[:length])
        with pytest.raises(DamagedEntry, match=path.name):
            read_stacked(store, rows_of)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_stacked(store, rows_of)
