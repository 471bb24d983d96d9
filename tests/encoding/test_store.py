"""The store: exact, checked on reading, keyed by what decides the value."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch

from qwen_image_finetune.encoding import store as store_module
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


def test_fingerprints_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SETTLED", 0)
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    fingerprints = Fingerprints(tmp_path)
    expected = fingerprints.file(file)
    fingerprints.save()
    marked = "5" * 64  # only what is remembered can be this
    fingerprints.path.write_text(fingerprints.path.read_text().replace(expected, marked))
    assert Fingerprints(tmp_path).file(file) == marked


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    """It may be written again within one tick of the clock that its times are read from."""
    (tmp_path / "file").write_bytes(b"abc")
    fingerprints = Fingerprints(tmp_path)
    assert fingerprints.file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
    fingerprints.save()
    assert json.loads(fingerprints.path.read_text()) == {}


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_file_replaced_with_its_size_and_time_kept_is_read_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SETTLED", 0)
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    fingerprints = Fingerprints(tmp_path)
    fingerprints.file(file)
    fingerprints.save()
    times = file.stat()
    if how == "another file":
        (tmp_path / "new").write_bytes(b"xyz")
        os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(tmp_path / "new", file)
    else:
        time.sleep(0.02)  # another tick of the clock
        file.write_bytes(b"xyz")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    for again in (fingerprints, Fingerprints(tmp_path)):
        assert again.file(file) == hashlib.sha256(b"xyz").hexdigest()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", ["{broken", "[]", "3", '{"F": 1}', '{"F": [3, 4, "a"]}', '{"F": [0, 0, 0, 0, 7]}', "[" * 100_000, None]
)
def test_a_memory_of_another_shape_costs_a_reading(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    memory = tmp_path / "fingerprints.json"
    os.mkfifo(memory) if text is None else memory.write_text(text.replace("F", str(file)))
    assert Fingerprints(tmp_path).file(file) == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("owner", ["models--owner--name", "my pictures"])
def test_only_a_blob_of_the_hub_is_not_read(owner: str, tmp_path: Path) -> None:
    name = "ab" * 32
    blobs, snapshot = tmp_path / owner / "blobs", tmp_path / owner / "snapshots" / "main" / "vae"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / name).write_bytes(b"whatever")
    (snapshot / "model.safetensors").symlink_to(blobs / name)
    (tmp_path / "elsewhere").symlink_to(blobs / name)
    content = hashlib.sha256(b"whatever").hexdigest()
    fingerprints = Fingerprints(tmp_path)
    assert fingerprints.file(snapshot / "model.safetensors") == (name if owner.startswith("models--") else content)
    assert fingerprints.file(blobs / name) == fingerprints.file(tmp_path / "elsewhere") == content


def test_entries_under_each_others_names_are_damaged(store: Store) -> None:
    other = entry_key(text="b")
    store.write(KEY, {"x": torch.ones(1)})
    store.write(other, {"x": torch.zeros(1)})
    one, two = store.path(KEY).read_bytes(), store.path(other).read_bytes()
    store.path(KEY).write_bytes(two)
    store.path(other).write_bytes(one)
    assert not store.verify(KEY) and not store.verify(other)
    with pytest.raises(DamagedEntry):
        store.read(KEY)
    store.path(KEY).write_bytes(one)
    assert store.verify(KEY)
