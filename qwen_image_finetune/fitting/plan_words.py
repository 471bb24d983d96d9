"""What a plan says: peaks, whether they fit, what would make them fit, and how long a step takes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from qwen_image_finetune.config import Config, ConfigError, resolve_family
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting import choice, speed
from qwen_image_finetune.fitting.estimate import GIB, OUTSIDE, Estimator, Size
from qwen_image_finetune.fitting.plan import (
    NothingFits,
    as_overrides,
    asks,
    beside_the_model,
    card_memory,
    cheapest_change,
    decided,
    host_warnings,
    last_resort,
    parse_memory,
    this_card,
    with_keys,
)
from qwen_image_finetune.levers import attention
from qwen_image_finetune.levers.stored_precision import local_checkpoint
from qwen_image_finetune.loading import weight_dtype

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of a base that is not quantised


def describe(config: Config, card: str | None, references: int | None = None) -> str:
    """The plan of a run in words.

    Args:
        card: its memory, such as "24GB", or its name, such as "H100"; without it, this machine's card if there is one.
        references: of each pair; without it, one where the family takes any.

    Raises:
        ConfigError: `card` is neither, or several cards; the family takes fewer references; the checkpoint contradicts
            the configuration.
    """
    estimator = estimator_of(config, references)
    named = card_named(card)
    memory = card_memory() if card is None else named.memory * GIB if named is not None else parse_memory(card)
    return "\n".join(_lines(estimator, memory, named, here=card is None))


def estimator_of(config: Config, references: int | None = None) -> Estimator:
    """Of a run whose pairs have so many references, each of the size of its target.

    Raises:
        ConfigError: the family takes fewer.
    """
    family, folder = get_family(resolve_family(config)[0]), local_checkpoint(config.model)
    if references is not None and references > family.max_references:
        most = f"at most {family.max_references}" if family.max_references else "none"
        raise ConfigError(f"--references {references}: {family.name} takes {most}")
    return Estimator(family, config, folder, references=references)


def summary(config: Config) -> Iterator[str]:
    """The plan in a few words: peaks, this machine's card, and the time of a step where it can be told."""
    estimator = estimator_of(config)
    card = card_memory()
    yield from decide(estimator, card, card_named(None), here=True)
    estimate = estimator.estimate()
    largest = sorted(estimate.device.items(), key=lambda part: -part[1])[:2]
    parts = ", ".join(f"{name} {size_words(size, 1)}" for name, size in largest)
    yield f"{size_words(estimate.peak, 1)} on the card while training: {parts}, ..."
    if estimate.encoding:
        yield f"{size_words(estimate.encoding, 1)} on the card while encoding, if the cache is not complete"
    yield f"{sum(estimate.host_parts.values()) / GIB:.1f} GiB on the host"
    if card is None:
        yield "no card here: `qif plan CONFIG --card 24GB` says whether it fits, and what would"
    else:
        words = "fits" if estimate.fits(card) else "does not fit"
        yield f"{words} the {card / GIB:.1f} GiB that are free here; `qif plan CONFIG` says more"
        yield step_words(estimator, estimator.config, estimator.format, card_named(None), here=True)
        yield from host_warnings(estimate)


def _lines(estimator: Estimator, card: int | None, named: speed.Card | None, here: bool) -> Iterator[str]:
    notes: list[str] = []
    with suppress(NothingFits):  # the table shows why, and what is proposed below is more than "auto" may change
        notes += decide(estimator, card, named, here)
    family, config, estimate, found = estimator.family, estimator.config, estimator.estimate(), estimator.footprint
    sizes = _sizes(estimator.own_sizes)
    base = estimator.format or PRECISIONS[config.train.mixed_precision]
    yield f"{family.name}, {count_words(found.weights)} weights, base in {base}"
    pictures = "target" if len(estimator.sizes) == 1 else "target and references"
    yield f"{pictures} {sizes}, {config.data.batch_size} a batch, {estimator.text_tokens} tokens of text"
    if estimator.folder is None and estimator.format is None and config.model.lora is not None:
        name = config.model.pretrained_model_name_or_path
        yield f"{name} is not on this machine, so its base is taken for one that is not quantised:"
        yield "`qif cache CONFIG` downloads it, and its files say; until then model.quantize=fp8 plans a base of 8 bits"
    yield from notes
    yield "on the card while training:"
    for name, size in estimate.device.items():
        yield f"  {size_words(size):>11}  {name}"
    yield f"  {size_words(estimate.peak):>11}  together, and about {OUTSIDE / GIB:.0f} GiB for the driver"
    if estimate.encoding:
        words = "encoders, or the VAE with a picture, before, if the cache is not complete"
        yield f"  {size_words(estimate.encoding):>11}  {words}"
    for name, size in (estimate.host | estimate.host_before).items():
        yield f"host: {size_words(size):>11}  {name}"
    if here and card is not None:
        yield from host_warnings(estimate)
    tera = estimate.operations / 1e12
    passes = "one forward and backward pass"
    if config.loss.preserves:
        yield "loss.preservation: a micro-batch passes forward and backward twice, and forward once without the adapter"
        passes = "all passes of a micro-batch"
        if estimator.preserved_sizes != estimator.own_sizes:
            yield f"its pairs have {_sizes(estimator.preserved_sizes)}; memory is that of the larger"
    yield f"{passes}: {f'{tera:.1f} TFLOP' if tera >= 0.1 else f'{1000 * tera:.1f} GFLOP'}"
    yield step_words(estimator, config, estimator.format, named, here)
    if card is None:
        yield "no card here and none named (--card 24GB): whether it fits is not said"
        return
    if estimate.fits(card):
        yield f"fits a card of {card / GIB:.0f} GiB"
        return
    yield f"does not fit a card of {card / GIB:.0f} GiB"
    if choice.asks(config) and (said := _room_for_a_choice(estimator, card, named, here)):
        yield from said
        return
    found_change = cheapest_change(estimator, card)
    if found_change is None:
        yield f"nothing that is known here makes it fit; what is left: {last_resort(config)}"
        return
    change, then = found_change
    yield f"the cheapest change that makes it fit ({then.peak / GIB:.1f} GiB): {as_overrides(config, change.keys)}"
    yield f"it costs {change.price}"
    format = change.keys.get("model.quantize", estimator.format)
    yield f"with it, {step_words(estimator, with_keys(config, change.keys), format, named, here)}"


def _room_for_a_choice(estimator: Estimator, card: int, named: speed.Card | None, here: bool) -> list[str]:
    """What to change beside precision and compilation so that these can be chosen; nothing where that is not enough."""
    change = beside_the_model(estimator, card)
    if not change.keys:
        return []
    config, other = estimator.config, copy.copy(estimator)
    other.config = with_keys(config, change.keys)
    try:
        chosen = list(decide(other, card, named, here))
    except NothingFits:
        return []
    peak = f"{other.estimate().peak / GIB:.1f} GiB"
    return [
        f"the cheapest change that makes it fit ({peak}): {as_overrides(config, change.keys)}",
        f"it costs {change.price}",
        *(f"with it, {sentence}" for sentence in chosen),
        f"with it, {step_words(other, other.config, other.format, named, here)}",
    ]


def _sizes(sizes: Sequence[Size]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def count_words(number: int) -> str:
    """A number of weights as people say it."""
    for name, unit in (("billion", 1e9), ("million", 1e6)):
        if number >= unit / 10:
            return f"{number / unit:.2f} {name}"
    return f"{number:,}"


def size_words(size: float, digits: int = 2) -> str:
    """Bytes in GiB, and in MiB or KiB where GiB would show nothing of them.

    Args:
        digits: behind the point of GiB.
    """
    for name, unit in (("GiB", GIB), ("MiB", 2**20)):
        if size >= unit * 10**-digits:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size / 2**10:.{digits}f} KiB" if size else "nothing"


def decide(estimator: Estimator, card: int | None, named: speed.Card | None, here: bool) -> Iterator[str]:
    """Let the estimator have the configuration in which every "auto" is decided for a card, and say it."""
    if choice.asks(estimator.config):
        estimator.config, sentence = choice.decided(estimator, card, named, here)
        estimator.format = estimator.format or estimator.config.model.asked_format
        yield sentence
    if card is not None and asks(estimator.config):
        estimator.config, sentence = decided(estimator, card)
        yield sentence


def step_words(estimator: Estimator, config: Config, format: str | None, card: speed.Card | None, here: bool) -> str:
    """How long an optimizer step takes on a card, or why that is not said.

    Args:
        here: the card is this machine's, so that it is known which attention runs.
    """
    if card is None:
        return "a step: not said of a card that is not known by name, as are those of docs/performance.md"
    step, lacking = _step(config, format, card, here)
    expected = step_seconds(estimator, config, format, card, here)
    if expected is not None:
        how = f"{step.attention} attention, {'compiled' if step.compiled else 'not compiled'}"
        return f"a step: about {expected:.2f} s, estimated from rates measured on an {card.name} ({how})"
    one = estimator.summed(step.preserves, lambda found, both: speed.floor(found, replace(step, preserves=both), card))
    least = config.train.gradient_accumulation_steps * one
    return f"a step: above {least:.2f} s, by the data sheet of the {card.name}; {lacking}"


def step_seconds(
    estimator: Estimator, config: Config, format: str | None, card: speed.Card | None, here: bool
) -> float | None:
    """What an optimizer step takes on a card; None where nothing like it was measured."""
    if card is None:
        return None
    step, lacking = _step(config, format, card, here)
    if lacking or speed.seconds(estimator.footprint, step, card) is None:
        return None
    one = estimator.summed(
        step.preserves, lambda found, both: speed.seconds(found, replace(step, preserves=both), card) or 0.0
    )
    return config.train.gradient_accumulation_steps * one


def _step(config: Config, format: str | None, card: speed.Card, here: bool) -> tuple[speed.Step, str | None]:
    """A step, and what of it was never measured on the card."""
    train = config.train
    name: str = train.attention if train.attention != "auto" else "flash"
    if here and torch.cuda.is_available():
        name = attention.choose(train.attention, torch.device("cuda"), weight_dtype(train.mixed_precision))
    unmeasured = [
        (card.attained is None, "no such card was measured"),
        (train.mixed_precision == "no", "products in float32 were not measured"),
        (config.model.lora is None, "full fine-tuning was not measured"),
        (train.blocks_to_swap not in (0, "auto"), "swapped blocks were not measured"),
        (train.offload_activations, "offloaded activations were not measured"),
        (
            format == "int8" and (card.attained is None or card.attained.int8_products is None),
            "products in int8 were not measured",
        ),
        (card.attained is not None and name not in card.attained.attention, f"{name} attention was not measured"),
    ]
    lacking = next((why for applies, why in unmeasured if applies), None)
    step = speed.Step(train.recomputation_keeps, train.compile is True, format, name, config.loss.preserves)
    return step, lacking


def card_named(text: str | None) -> speed.Card | None:
    """The card that `text` names, or, without it, this machine's; None where it is not known.

    Raises:
        ConfigError: it names several.
    """
    if text is not None:
        if re.search(r"^\s*\d+\s*[x×*]|[\d\s][x×*]\s*\d+\s*$", text, re.IGNORECASE):
            raise ConfigError(
                f"--card {text!r}: a plan is of one process on one card, so name one. docs/distributed.md says what "
                "each of several holds"
            )
        return speed.card_called(text)
    return this_card()
