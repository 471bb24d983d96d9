"""What a LoRA file says about itself, read from its header alone: no weights, no torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON and then the tensors; the JSON names each
tensor with dtype, shape and place. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import re
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers keeps the peft configuration here, as JSON
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # what peft's own save writes
LARGEST_CONFIG = 1_000_000  # bytes of the latter
LONGEST_NAME = 200  # characters of a module's name, and of a pattern for such names
MOST_REPEATS = 16  # of characters, in all patterns of a file
LARGEST_FLOAT = 3.4e38  # of float32
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
ELEMENT_BYTES = (
    dict.fromkeys(("F64", "I64"), 8)
    | dict.fromkeys(("F32", "I32"), 4)
    | dict.fromkeys(("F16", "BF16", "I16"), 2)
    | dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1)
)

# Of regular expressions: single characters, each repeated or not, and alternatives.
_HARMLESS = re.compile(r"\^?(?:(?:[\w. -]|\\(?:[^\w\\]|[dw_])|\[[\w-]+\])[*+?]?|\|)*\$?")


class LoraFileError(ValueError):
    """A LoRA file that cannot be used, in words for the person who has it."""


@dataclass(frozen=True)
class Declared:
    """What a file's metadata say about the alpha of its modules."""

    alpha: float | None = None  # None: nothing
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()  # of names of modules with another alpha
    rank_stabilised: bool = False  # a scale of alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732)

    def alpha_of(self, module: str, rank: int) -> float:
        """Alpha of a module of this rank: what is declared, or the rank itself, which is a scale of 1."""
        if self.alpha is None:
            return float(rank)
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.match(module)), self.alpha)
        return alpha * rank**0.5 if self.rank_stabilised else alpha


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
        metadata = {str(name): str(value) for name, value in content.pop("__metadata__", {}).items()}
        end = max((entry["data_offsets"][1] for entry in content.values()), default=0)
        for entry in content.values():
            _check_entry(entry)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise LoraFileError(f"{path} has a broken safetensors header ({error!r}); download or save it again") from error
    if 8 + length + end != size:
        raise LoraFileError(
            f"{path} has {size} bytes where its header says {8 + length + end}; download or save it again"
        )
    return metadata


def declared_alpha(metadata: dict[str, str], path: Path) -> Declared:
    """What is said about alpha by the peft configuration in the metadata, as diffusers keeps it, or else in the file
    that peft writes beside the weights; nothing where there is neither.

    Raises:
        LoraFileError: it is there and cannot be read.
    """
    inside = _parsed(metadata.get(ADAPTER_METADATA) or "{}", f"{path}: metadata {ADAPTER_METADATA}")
    beside = path.with_name(PEFT_CONFIG)
    if inside.alpha is not None or not beside.is_file():
        return inside
    if path.name != PEFT_WEIGHTS and len(list(path.parent.glob("*.safetensors"))) > 1:
        return inside  # the configuration may be of another one
    if beside.stat().st_size > LARGEST_CONFIG:
        raise LoraFileError(f"{beside} is larger than {LARGEST_CONFIG:,} bytes: no configuration of peft")
    return _parsed(beside.read_text(encoding="utf-8", errors="replace"), str(beside))


def _parsed(text: str, place: str) -> Declared:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{place} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoraFileError(f"{place} is not a JSON object")
    fields = {name.removeprefix("transformer."): value for name, value in content.items()}
    try:
        return _declared(fields)
    except ValueError as error:
        raise LoraFileError(f"{place}: {error}") from error


def _declared(fields: dict[str, Any]) -> Declared:
    if "lora_alpha" not in fields:
        return Declared()
    patterns, rank_stabilised = fields.get("alpha_pattern"), fields.get("use_rslora")
    if not isinstance(patterns, dict | None):
        raise ValueError(f"alpha_pattern is {_short(patterns)}; it must be an object of module names and numbers")
    if not isinstance(rank_stabilised, bool | None):
        raise ValueError(f"use_rslora is {_short(rank_stabilised)}; it must be true or false")
    alphas = {text: _number(value, f"alpha_pattern {_short(text)}") for text, value in (patterns or {}).items()}
    if sum(map(_repeats, alphas)) > MOST_REPEATS:
        raise ValueError(f"alpha_pattern repeats characters more than {MOST_REPEATS} times; use the modules' names")
    return Declared(
        alpha=_number(fields["lora_alpha"], "lora_alpha"),
        patterns=tuple((_compiled(text), alpha) for text, alpha in alphas.items()),
        rank_stabilised=bool(rank_stabilised),
    )


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST_FLOAT:  # nor NaN
        raise ValueError(f"{name} is {_short(value)}; it must be a number")
    return float(value)


def _compiled(text: str) -> re.Pattern[str]:
    """A pattern of peft, as peft looks names up with it; of its language only what cannot take for ever.

    Python's matching goes back over every repeat inside a repeat: `(a+)+` on a name of 40 letters takes years.
    """
    if len(text) > LONGEST_NAME or not _HARMLESS.fullmatch(text) or _repeats(text) > 2:
        raise ValueError(
            f"alpha_pattern {_short(text)} is not read; names of modules are, up to {LONGEST_NAME} characters, with |, "
            "[...] and at most two of * + ?, but no groups"
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except re.error as error:
        raise ValueError(f"alpha_pattern {_short(text)} is no regular expression: {error}") from error


def _repeats(text: str) -> int:
    return len(re.findall(r"(?<!\\)[*+?]", text))


def _short(value: Any) -> str:
    return reprlib.repr(value)


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
