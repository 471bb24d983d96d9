"""model.quantize=auto and train.compile=auto: what makes a run end soonest on a card that it fits.

Every pair of a precision and compiled or not is a candidate, with the memory levers that the planner finds for it. What
a step of it takes is known from `qif bench CONFIG --quick` on this card, or computed from the rates of `speed`. Of
candidates that are nearly as fast as the fastest, the one whose base is rounded least is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.config.exclusions import contradictions
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting import measured as remembered
from qwen_image_finetune.fitting import plan, speed
from qwen_image_finetune.fitting.estimate import GIB, Estimate, Estimator, Size
from qwen_image_finetune.fitting.host_memory import free_host_memory
from qwen_image_finetune.levers import attention
from qwen_image_finetune.loading import weight_dtype

FORMATS: tuple[str | None, ...] = (None, "int8", "fp8", "nf4")  # the least rounded first
NEARLY = 1.03  # a shorter run than this is no reason for a coarser base
FIRST_STEP = 60.0  # seconds that compiling takes, measured on an H100 (docs/performance.md)
ANY_HOST = 24 * GIB  # what is left of 32, supposed of a machine that is not this one
UNSET: dict[str, Any] = {"model.quantize": False, "train.compile": False}


@dataclass(frozen=True)
class Candidate:
    """One way to run."""

    config: Config  # nothing about memory, precision or compilation is left in it to decide
    format: str | None
    estimate: Estimate
    seconds: float | None  # of an optimizer step; None of a card that is not known
    measured: bool  # here, by `qif bench CONFIG --quick`

    @property
    def compiled(self) -> bool:
        """Whether its blocks are."""
        return self.config.train.compile is True


def asks(config: Config) -> bool:
    """Whether precision or compilation is left to be decided."""
    return config.model.quantize == "auto" or config.train.compile == "auto"


def kept(config: Config, version: Path | None) -> Config:
    """The configuration with what a run that is resumed was decided to be, by the file in its version folder."""
    file = None if version is None else version / "config.yaml"
    if not asks(config) or file is None or not file.is_file():
        return config
    from qwen_image_finetune.config import load_config

    before = load_config(file)
    news = {"model.quantize": before.model.quantize, "train.compile": before.train.compile}
    return plan.with_keys(config, _asked(config, news))


def settled(
    config: Config, family: Family, folder: Path | None, sizes: Sequence[Size], card: int | None, processes: int = 1
) -> tuple[Config, str | None]:
    """The configuration with nothing left to decide for a card, and what to say of it; see `plan.settled`.

    Raises:
        ConfigError: nothing fits.
    """
    why = None
    if asks(config):
        config, why = decided(Estimator(family, config, folder, sizes), card, plan.this_card(), here=True)
    config, sentence = plan.settled(config, family, folder, sizes, card, processes)
    return config, "\n".join(each for each in (why, sentence) if each) or None


def decided(estimator: Estimator, card: int | None, named: speed.Card | None, here: bool) -> tuple[Config, str]:
    """The estimator's configuration with precision and compilation decided, memory as it was, and one line why.

    Args:
        card: its bytes; None without a card.
        named: what is known of it.
        here: it is this machine's.

    Raises:
        NothingFits: with no choice.
    """
    config = estimator.config
    if card is None:
        return plan.with_keys(config, _asked(config, UNSET)), "no card here: nothing is quantised or compiled for one"
    found = list(candidates(estimator, card, named, here))
    if not found:
        raise plan.NothingFits(
            f"model.quantize=auto: no precision makes the run fit the {card / 2**30:.0f} GiB of this card; "
            f"`qif plan CONFIG` says what would, such as {plan.last_resort(config)}"
        )
    # Swapped blocks are page-locked: what the host has no room for is taken only if nothing else fits.
    room = free_host_memory() if here else ANY_HOST
    if room is not None:
        found = [one for one in found if sum(one.estimate.host_parts.values()) <= room] or found
    best, why = _best(found, config, named)
    news = _asked(config, _keys(best))
    sentence = f"chosen: {_words(news)}: {why}"
    if estimator.format is not None and "model.quantize" in news:  # the checkpoint's own: nothing is quantised
        news["model.quantize"] = False
    return plan.with_keys(config, news), sentence


def candidates(estimator: Estimator, card: int, named: speed.Card | None, here: bool) -> Iterator[Candidate]:
    """Those that fit, the least rounded and the compiled first."""
    config, _ = estimator.config, estimator.footprint  # counted once, for all copies
    known = remembered.read(estimator) if here else {}
    for format in _formats(estimator, named):
        for compiled in (True, False) if config.train.compile == "auto" else (config.train.compile,):
            keys = {"model.quantize": format or False, "train.compile": compiled}
            one = copy.copy(estimator)
            one.config, one.format = plan.with_keys(config, keys), format
            if contradictions(one.config) or (compiled and here and find_spec("triton") is None):
                continue
            try:
                if plan.asks(one.config):
                    one.config, _ = plan.decided(one, card)
            except ConfigError:
                continue
            estimate = one.estimate()
            if not estimate.fits(card) or one.config.train.compile is not compiled:  # swapped blocks are not compiled
                continue
            measured = known.get(remembered.label(format, bool(compiled)))
            seconds = measured
            if seconds is None and named is not None:
                seconds = supposed(one, estimate, named, _attention(one.config, here))
            yield Candidate(one.config, format, estimate, seconds, measured is not None)


def _formats(estimator: Estimator, named: speed.Card | None) -> Iterator[str | None]:
    if estimator.config.model.quantize != "auto" or estimator.format is not None:
        yield estimator.format
        return
    for format in FORMATS:
        lacking = format == "nf4" and find_spec("bitsandbytes") is None
        if not lacking and not (format == "fp8" and (named is None or named.fp8_products is None)):
            yield format


def _attention(config: Config, here: bool) -> str:
    """What attends in a run; on a card that is not here, what all of them have."""
    asked = config.train.attention
    if here and torch.cuda.is_available():
        return attention.choose(asked, torch.device("cuda"), weight_dtype(config.train.mixed_precision))
    return asked if asked != "auto" else "flash"


def supposed(estimator: Estimator, estimate: Estimate, named: speed.Card, attends: str) -> float:
    """Seconds of an optimizer step.

    What is fetched from the host hides behind the computing of its own pass, or that behind it: a forward pass fetches
    as many blocks as the longer backward one.
    """
    train = estimator.config.train
    preserves = estimator.config.loss.preserves
    step = speed.Step(train.recomputation_keeps, train.compile is True, estimator.format, attends, preserves)
    blocks, activations = (estimate.host.get(part, 0) for part in ("swapped blocks", "activations"))
    forwards, backwards = (3, 2) if preserves else (1, 1)
    computed = estimator.summed(
        preserves, lambda found, both: speed.supposed(found, replace(step, preserves=both), named)
    )
    forward = computed / (forwards + backwards * (3 if train.gradient_checkpointing else 2))
    backward = (computed - forwards * forward) / backwards
    alone = forwards - backwards  # the passes without gradients keep no activations
    passes = [(alone, forward, blocks), (backwards, forward, max(blocks, activations)),  # each way of the link
              (backwards, backward, blocks + activations)]  # fmt: skip
    seconds = sum(count * max(computing, fetched / named.link) for count, computing, fetched in passes)
    return train.gradient_accumulation_steps * seconds


def _best(found: Sequence[Candidate], config: Config, named: speed.Card | None) -> tuple[Candidate, str]:
    measured = [one for one in found if one.measured]
    timed = [(one, one.seconds) for one in measured or found if one.seconds is not None]
    if not timed:  # 8 bits are only fast where they are compiled
        found = sorted(found, key=lambda one: bool(one.estimate.host.get("swapped blocks")))  # which takes long
        first = next((one for one in found if one.compiled == (one.format in ("int8", "fp8"))), found[0])
        return first, "the first that fits; nothing is known of this card's speed"
    steps = config.max_steps or 1000
    total = [(one, seconds * steps + FIRST_STEP * one.compiled) for one, seconds in timed]
    least = min(each for _, each in total)
    best = next(one for one, each in total if each <= NEARLY * least)
    source = _source(best, named)
    others = sorted((seconds, _words(_asked(config, _keys(one)))) for one, seconds in timed if one is not best)
    beside = f", the next {others[0][0]:.3g} s ({others[0][1]})" if others else ""
    return best, f"{best.seconds:.3g} s a step{beside}; {source}"


def _source(best: Candidate, named: speed.Card | None) -> str:
    if best.measured:
        return "measured here by `qif bench CONFIG --quick`"
    assert named is not None
    if named.attained is not None and best.format != "int8":
        return f"from rates measured on an {named.name}"
    return f"a guess from the data sheet of the {named.name}: `qif bench CONFIG --quick` measures it"


def _keys(one: Candidate) -> dict[str, Any]:
    return {"model.quantize": one.format or False, "train.compile": one.compiled}


def _words(keys: dict[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in keys.items())


def _asked(config: Config, news: dict[str, Any]) -> dict[str, Any]:
    """Of new values, those of keys that are "auto"."""
    open_ = {"model.quantize": config.model.quantize == "auto", "train.compile": config.train.compile == "auto"}
    return {key: value for key, value in news.items() if open_[key]}
