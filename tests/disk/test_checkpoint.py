"""State to disk and back, exactly; refusal of what is not state; the thread that writes."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qwen_image_finetune.disk.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    load_state,
    num_bytes,
    save_state,
    snapshot,
)
from qwen_image_finetune.disk.files import DiskFull
from qwen_image_finetune.disk.manifest import verify_folder

# `QIF_FAULTS=full` runs the counts that the documentation quotes; otherwise a sample that fits CI.
FULL = os.environ.get("QIF_FAULTS") == "full"


def same(one: Any, other: Any) -> bool:
    """Equal in every type, bit and order; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
        )
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(left, right) for left, right in zip(one.items(), other.items(), strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(left, right) for left, right in zip(one, other, strict=True))
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def round_trip(folder: Path, state: Any) -> Any:
    save_state(folder, {"part": state})
    return load_state(folder, "part")


# Exactness

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
NESTS = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=8) | st.booleans(), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(NESTS)
@settings(max_examples=2000 if FULL else 150, deadline=None)
def test_nests_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    assert same(round_trip(tmp_path_factory.mktemp("state"), state), state)


@pytest.mark.parametrize("state", [
    {0: "int", "0": "text", (1, 2.5): "tuple"}, {"dict": [[1, 2]]}, {"tensor": ["a", "float32", []]}, [], (), {}, [()],
    {1: {}, True and 2: ()}, [1, 1.0, True], -0.0, 5e-324, 1.7976931348623157e308, math.nan, math.inf, -math.inf,
    2**80, "\ud800\u2028\x00", [[None], (None,)],
])  # fmt: skip
def test_corner_cases_come_back_exactly(tmp_path: Path, state: Any) -> None:
    assert same(round_trip(tmp_path, state), state)


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64,
])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_tensors_of_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = math.prod(shape) * dtype.itemsize
    raw = [byte % 2 if dtype is torch.bool else byte for byte in random.Random(0).randbytes(size)]
    tensor = (
        torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    )
    assert same(round_trip(tmp_path, {"state": {0: tensor}}), {"state": {0: tensor}})
    assert same(snapshot([tensor]), [tensor])


def test_views_parameters_and_non_finite_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    base[0, 0], base[0, 1] = math.nan, -math.inf
    state = [base.t(), base[::2, 1::2], base[1].expand(3, 6)]
    assert same(round_trip(tmp_path, state), state)
    loaded = round_trip(tmp_path, torch.nn.Parameter(base))
    assert same(loaded, base)
    assert not loaded.requires_grad


def test_a_tensor_that_occurs_twice_is_kept_once(tmp_path: Path) -> None:
    """bitsandbytes shares its quantisation maps among all parameters."""
    shared = torch.arange(256.0)
    copies = snapshot({"a": {"qmap": shared}, "b": {"qmap": shared}, "c": shared.clone()})
    assert copies["a"]["qmap"] is copies["b"]["qmap"]
    assert copies["c"] is not copies["a"]["qmap"]
    loaded = round_trip(tmp_path, copies)
    assert loaded["a"]["qmap"] is loaded["b"]["qmap"]
    assert (tmp_path / "part.safetensors").stat().st_size < 3 * 1024
    assert same(loaded, copies)


def test_names_that_look_alike_do_not_collide(tmp_path: Path) -> None:
    state = {0: torch.zeros(1), "0": torch.ones(1), "a.b": torch.full((1,), 2.0), "a": {"b": torch.full((1,), 3.0)}}
    assert same(round_trip(tmp_path, state), state)


def test_parts_are_files_of_their_own(tmp_path: Path) -> None:
    save_state(tmp_path, {"progress": {"step": 3}, "optimizer": {"state": torch.ones(2)}})
    assert set(os.listdir(tmp_path)) == {"progress.json", "optimizer.json", "optimizer.safetensors"}
    assert load_state(tmp_path, "progress") == {"step": 3}


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    tensor = torch.arange(100_000.0)
    loaded = round_trip(tmp_path, tensor)
    os.truncate(tmp_path / "part.safetensors", 0)  # of a mapped file, the next read would be a SIGBUS
    assert same(loaded, tensor)


def test_snapshot_is_untouched_by_what_follows() -> None:
    tensor = torch.zeros(3)
    state: dict[str, Any] = {"a": [tensor, (tensor[1:],)], "b": 1}
    copies = snapshot(state)
    tensor.add_(1)
    state["a"].append(2)
    assert same(copies, {"a": [torch.zeros(3), (torch.zeros(2),)], "b": 1})


def test_a_snapshot_is_not_copied_again_on_its_way_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of an optimizer can be larger than the model, and host memory has room for it once."""
    given: dict[str, Tensor] = {}
    monkeypatch.setattr("qwen_image_finetune.disk.checkpoint.save_file", lambda tensors, path: given.update(tensors))
    state = torch.arange(6.0)
    copies = snapshot({"whole": state, "part": state[2:]})
    save_state(tmp_path, {"optimizer": copies})
    assert [tensor.data_ptr() for tensor in given.values()] == [tensor.data_ptr() for tensor in copies.values()]


def test_a_part_may_stay_in_its_file(tmp_path: Path) -> None:
    state = {"step": 3, "state": torch.arange(6.0)}
    save_state(tmp_path, {"optimizer": state})
    assert same(load_state(tmp_path, "optimizer", mapped=True), state)


def test_num_bytes() -> None:
    assert num_bytes({"a": [torch.zeros(3), (torch.zeros(5, dtype=torch.bfloat16), 7)], "b": "text"}) == 22


# Refusals


class Sharded(Tensor):
    """Stands for DTensor and its like."""


@pytest.mark.parametrize(("state", "message"), [
    ({"a": [1, object()]}, r"part\.a\.1 is a object"),
    ({"a": {1, 2}}, r"part\.a is a set"),
    (b"bytes", "part is a bytes"),
    ({"lambda": [print]}, r"part\.lambda\.0 is a builtin"),
    ([torch.zeros(2).as_subclass(Sharded)], "a Sharded cannot be saved as it is"),
])  # fmt: skip
def test_what_cannot_be_held_is_refused_by_place(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path, {"part": state})


def test_subclasses_of_plain_types_become_plain(tmp_path: Path) -> None:
    import numpy

    loaded = round_trip(tmp_path, {"a": OrderedDict(x=1), "b": numpy.float64(0.1)})
    assert same(loaded, {"a": {"x": 1}, "b": 0.1})


@pytest.mark.parametrize("text", [
    "", "{", "NaN", "[Infinity]", '{"set": []}', "{}", '{"dict": [], "tuple": []}', '{"dict": [[1]]}', '{"dict": 3}',
    '{"dict": [[[1], 2]]}', '{"tuple": 5}', '{"float": [1]}', '{"float": "one"}', '{"tensor": 3}',
    '{"tensor": ["a", "float32"]}', '{"tensor": ["missing", "float32", []]}', "[" * 200_000, "9" * 10_000,
    '{"tensor": ["a", "float64", [2, 3]]}', '{"tensor": ["a", "float32", [3, 2]]}', "1",
])  # fmt: skip
def test_json_that_is_no_state(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "part.safetensors")
    (tmp_path / "part.json").write_text(text)
    with pytest.raises(CheckpointError, match="part"):
        load_state(tmp_path, "part")


def huge_header() -> bytes:
    return struct.pack("<Q", 2**63) + b"{}"


def overlong_tensor() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.mark.parametrize("content", [
    b"", b"\x00" * 7, huge_header(), overlong_tensor(), struct.pack("<Q", 4) + b"[[[[", b"PK\x03\x04" + bytes(100),
], ids=["empty", "short", "huge header", "overlong tensor", "broken header", "zip"])  # fmt: skip
def test_safetensors_that_are_none(tmp_path: Path, content: bytes) -> None:
    save_state(tmp_path, {"part": {"a": torch.zeros(2, 3)}})
    (tmp_path / "part.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"part\.json/\.safetensors cannot be read"):
        load_state(tmp_path, "part")


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_pickles_do_not_execute(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    save_state(tmp_path, {"part": {"a": torch.zeros(2)}})
    good = (tmp_path / "part.json").read_bytes()
    for name in ("part.safetensors", "part.json"):
        (tmp_path / "part.json").write_bytes(good)
        torch.save(Canary(canary), tmp_path / name)
        with pytest.raises(CheckpointError):
            load_state(tmp_path, "part")
        (tmp_path / name).write_bytes(pickle.dumps(Canary(canary)))
        with pytest.raises(CheckpointError):
            load_state(tmp_path, "part")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()
    assert canary.exists(), "the canary itself works"


def test_missing_part(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="optimizer"):
        load_state(tmp_path, "optimizer")


# The writer


def write_value(value: int) -> Any:
    return lambda folder: save_state(folder, {"part": {"value": value, "tensor": torch.full((1000,), float(value))}})


def nothing() -> None:
    pass


def test_training_goes_on_while_it_writes(tmp_path: Path) -> None:
    allowed, done = threading.Event(), []
    writer = CheckpointWriter()

    def write(folder: Path) -> None:
        assert allowed.wait(60)
        write_value(1)(folder)

    writer.submit(tmp_path / "one", write, lambda: done.append(verify_folder(tmp_path / "one")))
    assert not (tmp_path / "one").exists()
    assert done == []
    allowed.set()
    writer.wait()
    assert done == [None], "what follows runs once the folder is complete"
    writer.wait()


def test_one_at_a_time_and_in_order(tmp_path: Path) -> None:
    writer, order = CheckpointWriter(), []

    def write(folder: Path) -> None:
        order.append("begin")
        time.sleep(0.05)
        order.append("end")

    for number in range(3):
        writer.submit(tmp_path / str(number), write, nothing)
    writer.wait()
    assert order == ["begin", "end"] * 3


def test_errors_come_back_at_the_next_call_once(tmp_path: Path) -> None:
    writer, ran = CheckpointWriter(), []

    def fail(folder: Path) -> None:
        raise OSError("the disk is on fire")

    writer.submit(tmp_path / "one", fail, lambda: ran.append(1))
    with pytest.raises(OSError, match="on fire"):
        writer.submit(tmp_path / "two", write_value(2), nothing)
    writer.submit(tmp_path / "three", write_value(3), nothing)
    writer.wait()
    assert ran == []
    assert os.listdir(tmp_path) == ["three"]
    writer.submit(tmp_path / "four", fail, nothing)
    with pytest.raises(OSError, match="on fire"):
        writer.wait()


def test_a_disk_that_is_too_small_is_said_with_the_size(tmp_path: Path) -> None:
    writer = CheckpointWriter()
    writer.submit(tmp_path / "one", write_value(1), nothing, needed=10**18)
    with pytest.raises(DiskFull, match=r"one: it needs 1,000,000,000,000 MB"):
        writer.wait()


def test_the_end_of_the_process_waits_for_the_writer(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from qwen_image_finetune.disk.checkpoint import CheckpointWriter
        def write(folder):
            time.sleep(0.3)
            (folder / "state").write_text("whole")
        CheckpointWriter().submit(Path({str(tmp_path / "one")!r}), write, lambda: None)
        sys.exit(143)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, check=False)
    assert done.returncode == 143
    assert verify_folder(tmp_path / "one") is None
    assert (tmp_path / "one" / "state").read_text() == "whole"


def test_killed_while_the_writer_writes(tmp_path: Path) -> None:
    """One process saves again and again and is killed; every folder that can be seen is whole and right."""
    code = f"""
        import os, random, signal, sys, threading, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import torch
        from qwen_image_finetune.disk.checkpoint import CheckpointWriter, save_state, snapshot
        torch.set_num_threads(1)
        folder = Path({str(tmp_path)!r})
        for seed in range({60 if FULL else 6}):
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                continue
            (folder / str(seed)).mkdir()
            writer, weights = CheckpointWriter(), torch.zeros(50_000)
            def stop():
                while len(list((folder / str(seed)).glob("[0-9]*"))) < 2:  # on a slow disk too
                    time.sleep(0.001)
                time.sleep(random.Random(seed).uniform(0, 0.1))
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=stop).start()
            for step in range(10_000):
                weights += 1
                state = snapshot({{"step": step + 1, "weights": weights}})
                write = lambda stage, state=state: save_state(stage, {{"part": state}})
                writer.submit(folder / str(seed) / str(step + 1), write, lambda: None)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=280, check=True)
    seen = list(tmp_path.glob("*/[0-9]*"))
    assert len(seen) >= 2 * (60 if FULL else 6)
    for folder in seen:
        assert verify_folder(folder) is None
        state = load_state(folder, "part")
        assert state["step"] == int(folder.name)
        assert torch.equal(state["weights"], torch.full((50_000,), float(state["step"])))
