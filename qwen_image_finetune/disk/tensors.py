"""A safetensors file written tensor by tensor: what is in memory is one tensor, not the file.

The format (https://github.com/huggingface/safetensors#format) has the sizes of all tensors first, so that they must be
known; the library's own writer takes all tensors at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor

from qwen_image_finetune.disk.files import Staged

# torch's types in the words of safetensors.
WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class TensorFile:
    """Writes tensors of the announced names, types and shapes, in their order."""

    def __init__(self, path: Staged, announced: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """
        Args:
            path: of the file, which is written from its beginning.
            announced: tensors of which type and shape count: they may be on the device `meta`.
        """
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, tensor in announced.items():
            size = tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size],
            }  # fmt: skip
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight bytes
        self.size = 8 + len(text) + offset
        self._waiting = [(name, tensor.dtype, tensor.shape) for name, tensor in announced.items()][::-1]
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: it is not the next one that was announced.
        """
        expected = self._waiting.pop()
        if expected != (name, tensor.dtype, tensor.shape):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} comes where {expected} was announced")
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
