"""What a LoRA file says about itself, read from its header alone: no weights, no torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON and then the tensors; the JSON names each
tensor with dtype, shape and place. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers keeps the peft configuration here, as JSON
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
ELEMENT_BYTES = (
    dict.fromkeys(("F64", "I64"), 8)
    | dict.fromkeys(("F32", "I32"), 4)
    | dict.fromkeys(("F16", "BF16", "I16"), 2)
    | dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1)
)

# Where a key says that its module sits; the latter with the dots of its name flattened to underscores.
PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.", "pipe.dit.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_PARTS = re.compile(
    r"^(?P<module>.+)\.(?:(?P<down>lora_A(\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<up>lora_B(\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight)|(?P<alpha>alpha))$"
)


class LoraFileError(ValueError):
    """A LoRA file that cannot be used, in words for the person who has it."""


@dataclass(frozen=True)
class Key:
    """One tensor name taken apart."""

    module: str  # without the prefix
    flat: bool  # dots of the module's name are underscores
    part: str  # down, up or alpha


def parse_key(key: str) -> Key | None:
    """The name of a tensor taken apart; None where it belongs to no plain LoRA of a transformer."""
    prefix = next((known for known in (*PREFIXES, *FLAT_PREFIXES) if key.startswith(known)), "")
    rest = key.removeprefix(prefix)
    match = _PARTS.match(rest)
    if match is None or rest.startswith(("text_encoder", "lora_te")):
        return None
    part = next(name for name in ("down", "up", "alpha") if match[name] is not None)
    return Key(match["module"], prefix in FLAT_PREFIXES, part)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, its whole header checked against the size of the file.

    Raises:
        LoraFileError: it is not such a file, or a part is missing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > LARGEST_HEADER or 8 + length > size or not length:
            raise LoraFileError(
                f"{path} is not a safetensors file, or was cut short: it announces a header of {length} bytes and "
                f"has {size} in all; download or save it again"
            )
        text = file.read(length)
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in content.values()), default=0)
        for entry in content.values():
            _check_entry(entry)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise LoraFileError(f"{path} has a broken safetensors header ({error!r}); download or save it again") from error
    if 8 + length + end != size:
        raise LoraFileError(
            f"{path} has {size} bytes where its header says {8 + length + end}; download or save it again"
        )
    return {str(name): str(value) for name, value in metadata.items()}


def adapter_metadata(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The peft configuration that diffusers keeps in the metadata, without its prefix; empty where there is none.

    Raises:
        LoraFileError: it is there and cannot be read.
    """
    try:
        content = json.loads(metadata.get(ADAPTER_METADATA) or "{}")
    except ValueError as error:
        raise LoraFileError(f"{path}: metadata {ADAPTER_METADATA} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoraFileError(f"{path}: metadata {ADAPTER_METADATA} is not a JSON object")
    return {name.removeprefix("transformer."): value for name, value in content.items()}


def pattern_value(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """A value of peft's rank_pattern or alpha_pattern for a module, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def declared_alpha(declared: dict[str, Any], module: str, rank: int) -> float:
    """Alpha of a module of this rank: what the peft configuration says, or the rank itself, which is a scale of 1."""
    if "lora_alpha" not in declared:
        return float(rank)
    alpha = float(pattern_value(declared.get("alpha_pattern"), module, declared["lora_alpha"]))
    return alpha * rank**0.5 if declared.get("use_rslora") else alpha


def _check_entry(entry: dict[str, Any]) -> None:
    start, end = entry["data_offsets"]
    elements = 1
    for side in entry["shape"]:
        elements *= side
    if (
        not 0 <= start <= end
        or min(entry["shape"], default=0) < 0
        or end - start != elements * ELEMENT_BYTES.get(entry["dtype"], 0)
    ):
        raise ValueError(f"dtype, shape and place of a tensor contradict each other: {entry}")
