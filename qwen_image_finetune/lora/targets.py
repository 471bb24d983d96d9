"""Which modules of a transformer an adapter sits on, read as peft reads it and checked before anything is changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.oft.layer import OFTLayer
from torch import nn

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.lora.names import USUAL_TARGETS

ADAPTED = (LoraLayer, LoKrLayer, LoHaLayer, OFTLayer)  # what peft makes of a layer, kind by kind


def adapted_layers(transformer: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, Any]]:
    """Names and layers that carry an adapter of any kind (this one, if named)."""
    for name, module in transformer.named_modules():
        if isinstance(module, ADAPTED) and (adapter_name is None or adapter_name in module.r):
            yield name, module


def lora_layers(transformer: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, LoraLayer]]:
    """The same of LoRAs alone."""
    return ((name, layer) for name, layer in adapted_layers(transformer, adapter_name) if isinstance(layer, LoraLayer))


def linear_modules(transformer: nn.Module) -> dict[str, nn.Module]:
    """Modules an adapter can sit on, by name; those that carry one already included."""
    wrapped = tuple(f"{name}." for name, _ in adapted_layers(transformer))
    modules = {name: module for name, module in transformer.named_modules() if not name.startswith(wrapped)}
    return {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, *ADAPTED))}


def target_modules(
    transformer: nn.Module, targets: list[str] | str | None, excluded: list[str] | str | None = None
) -> list[str]:
    """Names of the linear modules that `targets` means: endings, one expression over whole names, or "all-linear".

    None is the usual four; a run has its family's own written out before (`families.with_targets`).

    Args:
        excluded: of these, the ones to leave out: endings, or one expression over whole names.

    Raises:
        ConfigError: a target matches nothing, or something that is not a linear layer; or nothing is left out by one of
            `excluded`, or everything.
    """
    wanted = _wanted(transformer, targets)
    left = set(wanted)
    for ending in [excluded] if isinstance(excluded, str) else excluded or ():
        found = _matches(wanted, ending, isinstance(excluded, str))
        if not found:
            raise ConfigError(
                f"model.lora.exclude_modules: {ending!r} leaves nothing out; the targets end in "
                f"{', '.join(endings(wanted))}"
            )
        left.difference_update(found)
    if not left:
        raise ConfigError(f"model.lora.exclude_modules={excluded!r} leaves no target to train")
    return [name for name in wanted if name in left]


def _wanted(transformer: nn.Module, targets: list[str] | str | None) -> list[str]:
    linear = linear_modules(transformer)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return list(linear)
    expression = isinstance(targets, str)
    wanted = [targets] if isinstance(targets, str) else targets or USUAL_TARGETS
    inside = tuple(f"{name}." for name, _ in adapted_layers(transformer))
    others = [n for n, _ in transformer.named_modules() if n and n not in linear and not n.startswith(inside)]
    matched: set[str] = set()
    for target in wanted:
        found = _matches(linear, target, expression)
        stray = _matches(others, target, expression)
        if not found or stray:
            raise ConfigError(_no_match(target, stray, list(linear), expression))
        matched.update(found)
    return [name for name in linear if name in matched]


def endings(names: Iterable[str]) -> list[str]:
    """Distinct module names with the numbered block in front taken off, in order."""
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in names))


def _matches(names: Iterable[str], target: str, expression: bool) -> list[str]:
    if not expression:
        return [name for name in names if name == target or name.endswith(f".{target}")]
    pattern = re.compile(target)
    return [name for name in names if pattern.fullmatch(name)]


def _no_match(target: str, stray: list[str], linear: list[str], expression: bool) -> str:
    known = endings(linear)
    if stray:
        problem = f"matches {stray[0]!r}, which is not a linear layer"
    elif expression:
        problem = f"matches no linear layer: an expression must match whole names such as {linear[0]!r}"
    else:
        problem = "matches no linear layer"
    tails = dict.fromkeys(tail for ending in known for tail in _tails(ending))
    near = [] if expression else difflib.get_close_matches(target, tails, n=3, cutoff=0.6)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return f"model.lora.target_modules: {target!r} {problem}{hint}; linear layers end in {', '.join(known)}"


def _tails(name: str) -> list[str]:
    """'attn.to_out.0' -> itself, 'to_out.0'; a bare number is nobody's target."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts)) if not parts[start].isdigit()]
