"""Which settings make a run fit a card: the cheapest change of a configuration, and what is left to be decided.

How much memory each setting takes is what `estimate` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.config.exclusions import contradictions
from qwen_image_finetune.config.tree import find, shown
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting import speed
from qwen_image_finetune.fitting.estimate import AVERAGE, ENCODER_PARTS, GIB, OUTSIDE, Estimate, Estimator, Size
from qwen_image_finetune.fitting.host_memory import free_host_memory

KEEPS: tuple[float | None, ...] = (None, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
# What "auto" means without a card.
NOT_TUNED: dict[str, Any] = {"train.blocks_to_swap": 0, "train.keep_activations": 0.0}

# What makes each part that waits on the host smaller, at the least cost.
HOST_REMEDIES = {
    "swapped blocks": "a base of fewer bits is smaller, and swaps less or nothing (docs/precision.md)",
    "activations": "train.offload_activations=false",
    AVERAGE: "train.ema.device=null",
    "encoders": "cache.use_cache=true",
    "encoders, while they encode": "cache.text_encoder_device and the like without cpu",
    "the program": "close other programs",
}


@dataclass(frozen=True)
class Change:
    """Keys that are set anew, and what that costs."""

    keys: dict[str, Any]
    price: str


def as_overrides(config: Config, keys: dict[str, Any]) -> str:
    """Keys with their new values as overrides of a command line, but for those that `config` has already."""
    values = config.model_dump()
    news = {key: value for key, value in keys.items() if find(values, key) != value}
    return " ".join(f"{key}={shown(value).strip(chr(39))}" for key, value in news.items())


def cheapest_change(estimator: Estimator, card: int) -> tuple[Change, Estimate] | None:
    """The first of `changes` with which the run fits; None if nothing helps enough."""
    for change, changed, format in changes(estimator, card):
        estimate = estimator.estimate(changed, format)
        if estimate.fits(card):
            return change, estimate
    return None


def changes(estimator: Estimator, card: int) -> Iterator[tuple[Change, Config, str | None]]:
    """What can be changed, in the order of what it costs: nothing, time, precision."""
    config, first = estimator.config, beside_the_model(estimator, card)
    if first.keys:
        yield first, with_keys(config, first.keys), None
    for lossy, losses in _losses(estimator):
        for keys, price in memory_changes(estimator):
            together = {**first.keys, **lossy, **keys}
            changed, prices = with_keys(config, together), [first.price] if first.price else []
            yield Change(together, "; ".join([*prices, *losses, price])), changed, lossy.get("model.quantize")


def beside_the_model(estimator: Estimator, card: int) -> Change:
    """What makes room for the encoders, before and while a run trains; no keys where they have it."""
    base, prices = dict[str, Any](), []
    if not estimator.config.cache.use_cache:
        base["cache.use_cache"] = True
        prices.append("nothing: the encoders leave before training begins")
    keys, price = encoders_that_fit(estimator, card)
    if keys:
        prices.append(price)
    return Change(base | keys, "; ".join(prices))


def encoders_that_fit(estimator: Estimator, card: int) -> tuple[dict[str, Any], str]:
    """What makes room for the encoders, and its price; nothing where they have it."""
    tiled: dict[str, Any] = {"model.vae_tiling": True}
    narrow: dict[str, Any] = {"model.quantize_text_encoders": True}
    of_pictures = "precision of the latents of large pictures"
    of_texts = "precision of the text embeddings (or, without that, time: cache.text_encoder_device=cpu)"
    choices: list[tuple[dict[str, Any], str]] = [({}, ""), (tiled, of_pictures), (narrow, of_texts)]
    for keys, price in [*choices, ({**tiled, **narrow}, f"{of_pictures}; {of_texts}")]:
        if estimator.encoding(with_keys(estimator.config, keys)) + OUTSIDE <= card:
            return keys, price
    keys = dict.fromkeys((f"cache.{name}_device" for name in ENCODER_PARTS), "cpu")
    return keys, "time, once: the data set is encoded on the CPU"


def _losses(estimator: Estimator) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Settings that change what is learnt, and what is lost by them: first nothing, then the least."""
    yield {}, []
    if estimator.config.model.lora is not None:
        for format in () if estimator.format else ("fp8", "nf4"):
            yield {"model.quantize": format}, ["precision of the frozen base"]
        return
    optimizer = estimator.config.optimizer
    choices: list[tuple[dict[str, Any], str]] = [
        ({"train.release_gradients": True, "train.max_grad_norm": None}, "gradients are not clipped"),
        ({"train.weight_precision": "bf16"}, "steps are rounded by chance"),
    ]
    # The other class takes the same arguments, but has another default of lr.
    if optimizer.class_path == "torch.optim.AdamW" and "init_args" in optimizer.model_fields_set:
        choices.append(({"optimizer.class_path": "bitsandbytes.optim.AdamW8bit"}, "the optimizer's precision"))
    # By the worst of what is lost, then by how much else is.
    for number in range(1, 1 << len(choices)):
        taken = [choice for place, choice in enumerate(choices) if number >> place & 1]
        keys = {key: value for one, _ in taken for key, value in one.items()}
        if not contradictions(with_keys(estimator.config, keys)):
            yield keys, [loss for _, loss in taken]


def fastest_that_fits(estimator: Estimator, card: int) -> tuple[Change, Estimate] | None:
    """The setting of the memory levers that loses the least time, results unchanged."""
    for keys, price in memory_changes(estimator):
        estimate = estimator.estimate(with_keys(estimator.config, keys))
        if estimate.fits(card):
            return Change(keys, price), estimate
    return None


def memory_changes(estimator: Estimator) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings of recomputation and swapping, the fastest first."""
    for keep in KEEPS:
        yield _recompute(keep), "time: a part is computed twice" if keep is not None else "nothing"
    yield _recompute("none"), "time: the whole forward pass is computed twice"
    if estimator.config.train.compile is True:  # which blocks that are swapped cannot be
        keys = {**_recompute(0.0), "train.offload_activations": True}
        yield keys, "time: a part is computed twice, activations are fetched"
    if estimator.config.model.lora is not None:
        for swapped in range(1, estimator.footprint.num_blocks + 1):
            keys = {**_recompute("none"), "train.blocks_to_swap": swapped, "train.compile": False}
            yield keys, "time: twofold computing, and weights that are fetched"
    yield {**_recompute("none"), "train.offload_activations": True}, "time: twofold computing, activations fetched"


def settled(
    config: Config,
    family: Family,
    folder: Path | None,
    sizes: Sequence[Size],
    card: int | None,
    processes: int = 1,
) -> tuple[Config, str | None]:
    """The configuration with every "auto" of memory decided for a card, and what to say of it.

    Args:
        folder: of the checkpoint; None: see Estimator.
        sizes: of the largest sample, target first.
        card: its free bytes; None without a card.
        processes: that share this machine's host memory.

    Raises:
        ConfigError: blocks would have to be swapped, which the configuration excludes; or nothing fits.
    """
    if card is None:
        keys = {key: none for key, none in NOT_TUNED.items() if find(config.model_dump(), key) == "auto"}
        untuned = keys or config.train.memory == "auto"
        return with_keys(config, keys), "no card here: memory is not tuned" if untuned else None
    estimator = Estimator(family, config, folder, sizes)
    if asks(config):
        config, sentence = decided(estimator, card)
        expected = estimator.estimate(config)
    else:
        expected = estimator.estimate()
        sentence = f"{expected.peak / GIB:.1f} GiB expected on the card, {card / GIB:.1f} are free"
        if not expected.fits(card):
            sentence += ": it may not fit; `qif plan` says what would"
    return config, "\n".join([sentence, *host_warnings(expected, processes)])


def host_warnings(estimate: Estimate, processes: int = 1) -> Iterator[str]:
    """A line if this machine has less host memory left than a run needs: the system would end it without a word."""
    parts, free = estimate.host_parts, free_host_memory()
    needed = processes * sum(parts.values())
    if free is None or needed <= free:
        return
    largest = max(parts, key=lambda name: parts[name])
    yield (
        f"warning: needs {needed / GIB:.1f} GiB of host memory, {free / GIB:.1f} are free: the system may end the run "
        f"without a word. Most is {largest} ({processes * parts[largest] / GIB:.1f}): {HOST_REMEDIES[largest]}"
    )


def asks(config: Config) -> bool:
    """Whether something about memory is left to be decided for the card."""
    train = config.train
    keep = train.gradient_checkpointing and train.keep_activations == "auto"
    return train.memory == "auto" or _swapping(config) or keep


class NothingFits(ConfigError):
    """Nothing that may be decided makes the run fit."""


def decided(estimator: Estimator, card: int) -> tuple[Config, str]:
    """The estimator's configuration with every "auto" of memory decided for a card of so many bytes, and a sentence.

    Raises:
        ConfigError: blocks would have to be swapped, which the configuration excludes.
        NothingFits: with no choice.
    """
    config, train = estimator.config, estimator.config.train
    if train.memory == "auto":
        found = fastest_that_fits(estimator, card)
        if found is None:
            raise _nothing_fits(config, card, "train.memory=auto")
        change, estimate = found
        chosen = {key: value for key, value in change.keys.items() if key != "train.memory"}
        return with_keys(config, change.keys), _decision(config, chosen, estimate)
    keeps = [*KEEPS[1:], "none"] if train.keep_activations == "auto" else [train.keep_activations]
    swaps = range(estimator.footprint.num_blocks + 1) if _swapping(config) else [train.blocks_to_swap]
    for swapped in swaps:
        if swapped and not train.gradient_checkpointing:
            raise ConfigError(
                "the card is too small for all blocks, and blocks are swapped with train.gradient_checkpointing=true "
                "only: set that"
            )
        for keep in keeps:
            keys: dict[str, Any] = {"train.blocks_to_swap": swapped, "train.keep_activations": keep}
            if swapped:
                keys["train.compile"] = False  # they exclude each other, and without swapping nothing fits
            estimate = estimator.estimate(with_keys(config, keys))
            if estimate.fits(card):
                return with_keys(config, keys), _decision(config, keys, estimate)
    raise _nothing_fits(config, card, "every block swapped" if _swapping(config) else "everything computed twice")


def _decision(config: Config, keys: dict[str, Any], estimate: Estimate) -> str:
    words = as_overrides(config, keys) or "nothing to change"
    return f"memory: {words} ({estimate.peak / GIB:.1f} GiB expected)"


def _swapping(config: Config) -> bool:
    train = config.train
    low = train.low_memory and train.blocks_to_swap == 0 and config.model.lora is not None  # what learns is not swapped
    return low or train.blocks_to_swap == "auto"


def _nothing_fits(config: Config, card: int, tried: str) -> NothingFits:
    return NothingFits(
        f"{tried}: even so the run does not fit the {card / GIB:.0f} GiB of this card; `qif plan CONFIG` says what "
        f"would, such as {last_resort(config)}"
    )


def last_resort(config: Config) -> str:
    """What is left where neither time nor memory on the host makes a run fit."""
    if config.model.lora is None:
        return (
            "model.lora in place of null, for an adapter needs a fraction of it, or the model shared over several "
            "cards (configs/accelerate/fsdp2.yaml)"
        )
    base = "" if config.model.quantize else "a quantised base (model.quantize), "
    return f"{base}a smaller data.init_args.resolution or data.batch_size"


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24GiB" or "24": cards are named by GB and have GiB.

    Raises:
        ConfigError: it is no such amount, or one that no card has.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) <= 1000:
        known = ", ".join(card.name for card in speed.CARDS)
        raise ConfigError(
            f"--card {text!r} is no amount of memory of a card; write it like 24GB (`qif plan` also takes {known})"
        )
    return int(float(match[1]) * GIB)


def card_memory() -> int | None:
    """Free bytes of the card of this process, with what torch has of it already; None without a card."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def this_card() -> speed.Card | None:
    """What is known of this machine's card; None without one, or of one that is not known."""
    return speed.card_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _recompute(keep: float | str | None) -> dict[str, Any]:
    if keep is None:
        return {"train.gradient_checkpointing": False, "train.memory": "as_written"}
    return {"train.gradient_checkpointing": True, "train.keep_activations": keep, "train.memory": "as_written"}


def with_keys(config: Config, keys: dict[str, Any]) -> Config:
    """The configuration with other values; what was said about it stays said."""
    changed = config
    for key, value in keys.items():
        section, _, name = key.partition(".")
        part = getattr(changed, section).model_copy(update={name: value})
        changed = changed.model_copy(update={section: part})
    return changed
