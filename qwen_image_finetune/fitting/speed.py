"""How long a step takes, from what is counted: operations over the rates that a card attains, bytes over its bandwidth.

A time is given where the rates were measured; where only a card's data sheet is known, what it says bounds the time
from below, and a card that is not known gets none. The model is compared with measured steps in tests/test_speed.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_image_finetune.fitting.footprint import Footprint

TERA = 1e12


@dataclass(frozen=True)
class Card:
    """A family of cards. Rates are of dense products summed in float32, in TFLOP/s; peaks are those of data sheets."""

    name: str  # all of its words are in what the driver calls the card
    memory: int  # GiB, as it is named
    products: float  # peak of 16-bit products
    fp8_products: float | None  # the same for fp8; None where the card has none
    bandwidth: float  # of its memory, GB/s
    attained: Attained | None = None

    def is_called(self, name: str) -> bool:
        """Whether `name`, as people or the driver write it, means this card."""
        words, parts = name.replace("-", " ").lower().split(), self.name.lower().split()
        if name.strip().isdigit():  # "4090", as people say
            return name.strip() in parts
        return all(any(part in word for word in words) for part in parts)


@dataclass(frozen=True)
class Attained:
    """What was measured on one such card, TFLOP/s."""

    products: float
    fp8_products: float
    attention: dict[str, tuple[float, float]] = field(default_factory=dict)  # by name: forward, backward


# docs/performance.md says how the H100's rates were measured.
_H100 = Attained(806, 1525, {"flash": (352, 301), "flash4": (721, 601)})
CARDS = (  # the more special name first
    Card("H100 PCIe", 80, 756, 1513, 2000),
    Card("H100", 80, 989, 1979, 3350, _H100),
    Card("H200", 141, 989, 1979, 4800),
    Card("B200", 180, 2250, 4500, 7700),
    Card("A100 80GB", 80, 312, None, 1935),
    Card("A100", 40, 312, None, 1555),
    Card("L40S", 48, 362, 733, 864),
    Card("RTX 6000 Ada", 48, 364, 728, 960),
    Card("RTX 5090", 32, 209, 419, 1792),
    Card("RTX 4090", 24, 165, 330, 1008),
    Card("RTX 3090", 24, 71, None, 936),
)

# The three constants that were fitted, to measured steps of the two architectures. Norms, activations, rotations and
# casts move so many times the bytes that a block keeps for its backward pass, in each pass; the backward one is two.
EAGER_TRAFFIC, COMPILED_TRAFFIC = 10.2, 4.9
# Bytes that are moved for each weight that is made a 16-bit one for the length of a product.
DEQUANTISED = 6.5


@dataclass(frozen=True)
class Step:
    """What decides how long a micro-batch takes."""

    keep: float | str | None  # as in train.keep_activations; None without recomputation
    compiled: bool
    format: str | None  # of the frozen base
    attention: str


def card_called(name: str) -> Card | None:
    """The card of this name, as people or the driver write it; None if it is not known."""
    return next((card for card in CARDS if card.is_called(name)), None)


def seconds(found: Footprint, step: Step, card: Card) -> float | None:
    """Expected time of one micro-batch of LoRA training; None where rates were not measured."""
    rates = card.attained
    if rates is None or step.attention not in rates.attention:
        return None
    work, recomputed = found.work(step.keep), step.keep is not None
    in_fp8 = step.format == "fp8" and card.fp8_products is not None
    forward, backward = rates.attention[step.attention]
    computing = work.products / (rates.fp8_products if in_fp8 else rates.products)
    computing += work.attention_forward / forward + work.attention_backward / backward
    # What is recomputed selectively inside a compiled region is part of its backward pass.
    passes = 3 + (recomputed and not (step.compiled and step.keep != "none"))
    moved = found.kept(None) * passes * (COMPILED_TRAFFIC if step.compiled else EAGER_TRAFFIC)
    if step.format is not None and not in_fp8:
        linear = sum(kind.count * kind.linear for kind in found.kinds.values())
        moved += linear * DEQUANTISED * (2 + recomputed)
    return computing / TERA + moved / (card.bandwidth * 1e9)


def floor(found: Footprint, step: Step, card: Card) -> float:
    """Time of one micro-batch at the peaks of the data sheet, attention in 16 bits, nothing else counted."""
    work = found.work(step.keep)
    in_fp8 = step.format == "fp8" and card.fp8_products is not None
    attention = (work.attention_forward + work.attention_backward) / card.products
    products = work.products / (card.fp8_products if in_fp8 and card.fp8_products else card.products)
    return (products + attention) / TERA
