"""The store: exact, checked on reading, keyed by what decides the value."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qwen_image_finetune.encoding.store import DamagedEntry, Fingerprints, Store, entry_key


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


KEY = entry_key(text="a")


def test_tensors_come_back_as_they_were(store: Store) -> None:
    tensors = {
        "half": torch.randn(3, 5, dtype=torch.float32).bfloat16(),
        "strided": torch.randn(4, 6).t()[1:],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
    }
    store.write(KEY, tensors)
    read = store.read(KEY)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_every_flipped_or_missing_byte_is_noticed(store: Store) -> None:
    store.write(KEY, {"latent": torch.arange(6.0).view(2, 3), "mask": torch.ones(2)})
    path, sound = store.path(KEY), store.path(KEY).read_bytes()
    assert store.verify(KEY)
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        if store.verify(KEY):  # only a change that means nothing may pass: the tensors are the same
            assert torch.equal(store.read(KEY)["latent"], torch.arange(6.0).view(2, 3))
            assert torch.equal(store.read(KEY)["mask"], torch.ones(2))
        else:
            with pytest.raises(DamagedEntry, match=path.name):
                store.read(KEY)
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        assert not store.verify(KEY)
        with pytest.raises(DamagedEntry):
            store.read(KEY)


def test_a_flip_in_the_tensors_never_passes(store: Store) -> None:
    store.write(KEY, {"latent": torch.arange(6.0)})
    sound = store.path(KEY).read_bytes()
    for place in range(len(sound) - 24, len(sound)):
        store.path(KEY).write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        assert not store.verify(KEY)


def test_missing_names_each_lacking_key_once(store: Store) -> None:
    other = entry_key(text="b")
    store.write(KEY, {"x": torch.ones(1)})
    assert store.missing([KEY, other, KEY, other]) == [other]
    store.path(KEY).unlink()
    assert store.missing([KEY, other]) == [KEY, other]


def test_writing_the_same_entry_twice_gives_the_same_bytes(store: Store) -> None:
    store.write(KEY, {"b": torch.ones(2), "a": torch.zeros(3)})
    first = store.path(KEY).read_bytes()
    store.write(KEY, {"a": torch.zeros(3), "b": torch.ones(2)})
    assert store.path(KEY).read_bytes() == first


def test_keys_depend_on_every_value_and_on_no_order() -> None:
    base = entry_key(text="a", references=[["x", [0, 0, 1, 1]]])
    assert base == entry_key(references=[["x", [0, 0, 1, 1]]], text="a")
    assert (
        len(
            {
                base,
                entry_key(text="b", references=[["x", [0, 0, 1, 1]]]),
                entry_key(text="a", references=[]),
                entry_key(text="a", references=[["x", [0, 0, 1, 2]]]),
            }
        )
        == 4
    )


def test_fingerprints_follow_content_not_names_or_times(tmp_path: Path) -> None:
    fingerprints = Fingerprints(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert fingerprints.file(one) == fingerprints.file(two)
    before = fingerprints.file(one)
    os.utime(one, (1, 1))
    assert fingerprints.file(one) == before
    one.write_bytes(b"abd")
    assert fingerprints.file(one) != before


def test_fingerprints_are_remembered_and_survive_a_damaged_memory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    fingerprints = Fingerprints(tmp_path)
    expected = fingerprints.file(file)
    fingerprints.save()
    file.write_bytes(b"xyz")  # same size; with the time set back only a remembered hash can be the old one
    os.utime(file, ns=(0, fingerprints._known[str(file.resolve())][1]))
    assert Fingerprints(tmp_path).file(file) == expected
    fingerprints.path.write_text("{broken")
    assert Fingerprints(tmp_path).file(file) != expected


def test_a_hub_blob_is_not_read_again(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    name = "ab" * 32
    (blobs / name).write_bytes(b"whatever")
    (tmp_path / "model.safetensors").symlink_to(blobs / name)
    assert Fingerprints(tmp_path).file(tmp_path / "model.safetensors") == name
