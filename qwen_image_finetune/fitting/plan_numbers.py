"""A plan as numbers, for programs that read it; `plan_words` says the same to people."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qwen_image_finetune.config import Config
from qwen_image_finetune.fitting.estimate import GIB, OUTSIDE
from qwen_image_finetune.fitting.plan import (
    NothingFits,
    card_memory,
    cheapest_change,
    host_warnings,
    last_resort,
    parse_memory,
    with_keys,
)
from qwen_image_finetune.fitting.plan_words import card_named, decide, estimator_of, step_seconds


def numbers(config: Config, card: str | None, references: int | None = None) -> dict[str, Any]:
    """The plan of a run: sizes in GiB, times in seconds, what is not known null.

    Args:
        card, references: as for `plan_words.describe`.

    Raises:
        ConfigError: as there.
    """
    estimator = estimator_of(config, references)
    named = card_named(card)
    memory = card_memory() if card is None else named.memory * GIB if named is not None else parse_memory(card)
    notes: list[str] = []
    here = card is None
    with suppress(NothingFits):
        notes += decide(estimator, memory, named, here)
    estimate = estimator.estimate()
    seconds = step_seconds(estimator, estimator.config, estimator.format, named, here)
    found: dict[str, Any] = {
        "family": estimator.family.name,
        "weights": estimator.footprint.weights,
        "base": estimator.format or config.train.mixed_precision,
        "sizes": [list(size) for size in estimator.sizes],
        "notes": [*notes, *(host_warnings(estimate) if here and memory is not None else ())],
        "on_card": _gib(estimate.device),
        "peak": round(estimate.peak / GIB, 2),
        "encoding": round(estimate.encoding / GIB, 2),
        "driver": round(OUTSIDE / GIB, 2),
        "on_host": _gib(estimate.host_parts),
        "card": None if memory is None else round(memory / GIB, 2),
        "fits": None if memory is None else estimate.fits(memory),
        "step_seconds": seconds,
        "seconds": None if seconds is None or config.max_steps is None else seconds * config.max_steps,
        "change": None,
        "last_resort": None,
    }
    if memory is not None and not estimate.fits(memory):
        cheapest = cheapest_change(estimator, memory)
        if cheapest is None:
            found["last_resort"] = last_resort(config)
        else:
            change, then = cheapest
            changed = with_keys(estimator.config, change.keys)
            after = step_seconds(estimator, changed, change.keys.get("model.quantize", estimator.format), named, here)
            found["change"] = {
                "keys": change.keys, "price": change.price, "peak": round(then.peak / GIB, 2), "step_seconds": after,
            }  # fmt: skip
    return found


def _gib(parts: Mapping[str, int]) -> dict[str, float]:
    return {name: round(size / GIB, 3) for name, size in parts.items()}
