"""Nested state to disk and back, exactly and without pickle; and a thread that writes while training goes on.

A part of a checkpoint, such as the state of an optimizer, is a nest of dicts, lists, tuples, plain values and tensors.
The tensors go to NAME.safetensors, the rest to NAME.json, in which a JSON object always stands for something that
JSON has no word for:

    {"dict": [[key, value], ...]}    {"tuple": [...]}    {"float": "nan"}    {"tensor": [name, dtype, shape]}
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.disk.files import Staged, staged_folder

Memo = dict[int, Any]  # id of a tensor -> its copy, so that a tensor that occurs twice is kept once


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it should be; names the file."""


def host_copy(tensor: Tensor) -> Tensor:
    """A copy of a plain tensor in host memory."""
    return _plain(tensor).to("cpu", copy=True)


def snapshot(state: Any, copy: Callable[[Tensor], Any] = host_copy, memo: Memo | None = None) -> Any:
    """`state` with a copy of every tensor, which training may not touch any more.

    Args:
        copy: makes one, called once for each tensor, in the order of `state`.
    """
    memo = {} if memo is None else memo
    if isinstance(state, Tensor):
        if id(state) not in memo:
            memo[id(state)] = copy(state)
        return memo[id(state)]
    if isinstance(state, Mapping):
        return {key: snapshot(value, copy, memo) for key, value in state.items()}
    if isinstance(state, list | tuple):
        copies = (snapshot(value, copy, memo) for value in state)
        return list(copies) if isinstance(state, list) else tuple(copies)
    return state


def num_bytes(state: Any) -> int:
    """Bytes of all tensors in `state`: nearly what a checkpoint of it takes on disk."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(num_bytes(value) for value in state.values())
    return sum(num_bytes(value) for value in state) if isinstance(state, list | tuple) else 0


def save_state(folder: Staged, parts: Mapping[str, Any]) -> None:
    """Write every part to `folder` as NAME.json and, where it holds tensors, NAME.safetensors.

    Subclasses of dict, int, float and str come back as the plain type; everything else comes back as it was.

    Raises:
        TypeError: a part holds something else than dict, list, tuple, int, float, bool, str, None and plain tensors;
            says where.
        OSError, SafetensorError: the file cannot be written (`staged_folder` words a full disk for both).
    """
    for name, state in parts.items():
        tensors: dict[str, Tensor] = {}
        skeleton = _encode(state, name, tensors, {})
        (folder / f"{name}.json").write_text(json.dumps(skeleton, allow_nan=False) + "\n")
        if tensors:
            # save_file takes no two tensors in the same memory, as views are. Those of a snapshot are not copied again.
            held = Counter(map(_place, tensors.values()))
            apart = {key: tensor.clone() if held[_place(tensor)] > 1 else tensor for key, tensor in tensors.items()}
            save_file(apart, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str, mapped: bool = False) -> Any:
    """The part `name` as it was given to `save_state`, its tensors in host memory.

    Args:
        mapped: leave the tensors in the file, from where they are read when they are used: for those who copy them.

    Raises:
        CheckpointError: a file is missing, is not what `save_state` writes, or the two files do not belong together.
    """
    path = folder / f"{name}.safetensors"
    try:
        skeleton = json.loads((folder / f"{name}.json").read_text())
        tensors = load_file(path) if path.exists() else {}
        if not mapped:  # what load_file returns is mapped from the file, and would fail with it
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        used: set[str] = set()
        state = _decode(skeleton, tensors, used)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name}.json/.safetensors cannot be read: {error}") from error
    if used != set(tensors):
        raise CheckpointError(f"{path} holds tensors that {name}.json does not name: {sorted(set(tensors) - used)}")
    return state


class CheckpointWriter:
    """Writes checkpoints in one background thread, at most one at a time, while training goes on."""

    def __init__(self) -> None:
        # A process that ends waits for the thread, and so finishes the checkpoint that it began.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def submit(self, final: Path, write: Callable[[Staged], None], then: Callable[[], None], needed: int = 0) -> None:
        """Begin to write the folder `final`: `write` fills it under a hidden name, `then` runs once it is complete.

        Waits for the previous one first. What `write` saves must be a snapshot.

        Args:
            needed: bytes that `write` will write, if known (`num_bytes`): a disk too small is refused at once.

        Raises:
            Exception: whatever went wrong in the previous one; the new one is not begun.
        """
        self.wait()

        def work() -> None:
            with staged_folder(final, needed) as folder:
                write(folder)
            then()

        self._writing = self._executor.submit(work)

    def wait(self) -> None:
        """Wait until nothing is being written, and raise what went wrong; once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def raise_if_failed(self) -> None:
        """Raise what went wrong in the background so far, without waiting; once."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def settle(self) -> None:
        """Wait until nothing is being written, whether or not it went well: for the end of a run that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            futures.wait([writing])


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without gradient. Sharded and packed subclasses are refused: their bytes alone are not their value."""
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise TypeError(f"a {type(tensor).__name__} cannot be saved as it is; gather or convert it to a plain tensor")
    return tensor.detach()


def _place(tensor: Tensor) -> int:
    """Address of the memory that a tensor is, or is a part of."""
    return tensor.untyped_storage().data_ptr()


def _encode(value: Any, where: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """The JSON skeleton of `value`; its tensors are added to `tensors`, named after the place where each is."""
    if isinstance(value, Tensor):
        plain = _plain(value)
        if id(value) not in names:
            unique = where if where not in tensors else f"{where}~{len(tensors)}"
            names[id(value)], tensors[unique] = unique, plain.cpu().contiguous()
        return {"tensor": [names[id(value)], str(plain.dtype).removeprefix("torch."), list(plain.shape)]}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, list):
        return [_encode(item, f"{where}.{index}", tensors, names) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [_encode(item, f"{where}.{index}", tensors, names) for index, item in enumerate(value)]}
    if isinstance(value, dict):
        pairs = [
            [_encode(key, f"{where}.key", tensors, names), _encode(item, f"{where}.{key}", tensors, names)]
            for key, item in value.items()
        ]
        return {"dict": pairs}
    raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")


def _decode(value: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    """What `_encode` was given. Raises ValueError or TypeError on anything that it does not write."""
    if isinstance(value, list):
        return [_decode(item, tensors, used) for item in value]
    if not isinstance(value, dict):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not written as a bare number")
        return value
    ((tag, content),) = value.items()
    if tag == "dict":
        return {_decode(key, tensors, used): _decode(item, tensors, used) for key, item in content}
    if tag == "tuple":
        return tuple(_decode(item, tensors, used) for item in content)
    if tag == "float":
        return float(content)
    if tag != "tensor":
        raise ValueError(f"unknown tag {tag!r}")
    name, dtype, shape = content
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing")
    tensor = tensors[name]
    found = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
    if found != (dtype, shape):
        raise ValueError(f"tensor {name!r} should be {dtype} {shape}, but is {found[0]} {found[1]}")
    used.add(name)
    return tensor
