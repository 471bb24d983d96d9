"""GGUF files of a transformer: their header, and their tensors as numbers.

The numbers are those of diffusers' own dequantisation. No lever computes in the block formats of GGUF, so a weight is
widened while it is read, one after the other, and quantised again where model.quantize asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.levers.stored_precision import StoredTensor

PLAIN = ("F32", "F16")  # kept as they are; all others are blocks of bytes


def gguf_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a GGUF file, its shape as torch has it.

    Raises:
        ConfigError: the file is broken, or holds a format that diffusers does not dequantise.
    """
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    known = {kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES} | set(PLAIN)
    found = {}
    with _readable(path):
        for tensor in _reader(path).tensors:
            shape = tuple(int(side) for side in reversed(tensor.shape))
            found[tensor.name] = StoredTensor(path, tensor.tensor_type.name, shape)
    if strange := sorted({entry.dtype for entry in found.values()} - known):
        raise ConfigError(f"{path}: weights in {', '.join(strange)} are not read; known are {', '.join(sorted(known))}")
    return found


class GgufTensors:
    """Tensors of a GGUF file by name, in the manner of `safetensors.safe_open`."""

    def __init__(self, path: Path) -> None:
        with _readable(path):
            self._tensors = {tensor.name: tensor for tensor in _reader(path).tensors}

    def get_tensor(self, key: str) -> Any:
        """Floats: as stored, where it is no block format, else float32."""
        return self.get_slice(key)[:]

    def get_slice(self, key: str) -> _Rows:
        """Its rows, of which those that are asked for are read."""
        return _Rows(self._tensors[key])


class _Rows:
    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __getitem__(self, rows: slice) -> Any:
        import torch
        from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

        data = torch.from_numpy(self._tensor.data[rows].copy())
        if self._tensor.tensor_type.name in PLAIN:
            return data
        return dequantize_gguf_tensor(GGUFParameter(data, quant_type=self._tensor.tensor_type))


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    return cast(Any, GGUFReader)(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path} is broken ({error}): download it again") from error
