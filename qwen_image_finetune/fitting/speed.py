"""How long a step takes, from what is counted: operations over the rates that a card attains, bytes over its bandwidth.

A time is given where the rates were measured; where only a card's data sheet is known, what it says bounds the time
from below, and a card that is not known gets none. To choose between settings (`supposed`) a guess does: that a card
reaches the share of its data sheet that the measured one does. The model is compared with measured steps in
tests/test_speed.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from qwen_image_finetune.fitting.footprint import Footprint

TERA = 1e12


@dataclass(frozen=True)
class Card:
    """A family of cards. Rates are of dense products summed in float32, in TFLOP/s; peaks are those of data sheets."""

    name: str  # all of its words are in what the driver calls the card
    memory: int  # GiB, as it is named
    products: float  # peak of 16-bit products
    fp8_products: float | None  # the same for fp8; None where the card has none
    int8_products: float  # the same for int8, summed in int32
    bandwidth: float  # of its memory, GB/s
    attained: Attained | None = None
    lanes: int = 16  # of PCIe 4.0, to the host; one of 5.0 counts as two, of 3.0 as a half

    @property
    def link(self) -> float:
        """Bytes a second between host and card, each way: 25 GB/s of the 31.5 that 16 lanes of PCIe 4.0 have by their
        data sheet, a guess, on a board that gives the card all its lanes."""
        return self.lanes / 16 * 25e9

    def is_called(self, name: str) -> bool:
        """Whether `name`, as people or the driver write it, means this card; one in a laptop has another chip."""
        apart = re.sub(r"(?<=\d)(?=(ti|super)\b)|(?<=rtx)(?=\d)", " ", re.sub(r"[-_]", " ", name.lower()))
        words, own = {"rtx", *apart.split()}, {*self.name.lower().split()}  # people say "4090"
        return own <= words and not (words - own) & {"laptop", "mobile", "ti", "super"}


@dataclass(frozen=True)
class Attained:
    """What was measured on one such card, TFLOP/s."""

    products: float
    fp8_products: float
    int8_products: float | None = None
    attention: dict[str, tuple[float, float]] = field(default_factory=dict)  # by name: forward, backward


def _geforce(
    name: str, memory: int, cores: int, clock: float, bandwidth: float, fp8: bool = True, lanes: int = 16
) -> Card:
    """Peaks by count, as the data sheets of these cards count them: each tensor core does in a cycle 128 operations in
    16 bits, 256 in fp8 (both summed in float32), 512 in int8.

    Args:
        cores: tensor cores, four of each multiprocessor.
        clock: GHz, boost.
        fp8: whether the generation has it.
    """
    products = cores * clock * 128 / 1000
    return Card(name, memory, products, 2 * products if fp8 else None, 4 * products, bandwidth, lanes=lanes)


# Measured are the H100's rates as `attained` alone; docs/performance.md says how. What the table itself says are peaks
# of NVIDIA's data sheets and whitepapers. Beside each card: which columns were compared with a published table (memory,
# products in 16 bits, fp8, int8, bandwidth); the others were not compared.
_H100 = Attained(806, 1525, attention={"flash": (352, 301), "flash4": (721, 601)})
CARDS = (  # the more special name first
    Card("H100 PCIe", 80, 756, 1513, 1513, 2000, lanes=32),  # compared: memory, bandwidth
    Card("H100", 80, 989, 1979, 1979, 3350, _H100, lanes=32),  # compared: all; attained: measured, but for int8
    # Compared: memory, 16 bits, fp8, bandwidth; int8 as of the H100's chip.
    Card("H200", 141, 989, 1979, 1979, 4800, lanes=32),
    # Compared: products, bandwidth; memory is 180 or 192 by system.
    Card("B200", 180, 2250, 4500, 4500, 7700, lanes=32),
    Card("A100 80GB", 80, 312, None, 624, 1935),  # compared: products; bandwidth of the PCIe card, SXM has 2039
    Card("A100", 40, 312, None, 624, 1555),  # compared: all
    Card("L40S", 48, 362, 733, 733, 864),  # compared: fp8, int8; in 16 bits the table says 366
    Card("L4", 24, 121, 242, 242, 300),  # compared: memory; products within 4 % of another table's
    Card("A10G", 24, 70, None, 140, 600),  # not compared
    Card("A10", 24, 125, None, 250, 600),  # compared: memory, bandwidth, number of cores and clock
    Card("T4", 16, 65, None, 130, 320, lanes=8),  # compared: all
    Card("RTX PRO 6000", 96, 504, 1008, 1008, 1792, lanes=32),  # compared: all
    Card("RTX 6000 Ada", 48, 364, 728, 728, 960),  # not compared
    Card("RTX A6000", 48, 155, None, 310, 768),  # not compared
    Card("RTX A5000", 24, 111, None, 222, 768),  # not compared
    Card("RTX A4000", 16, 77, None, 153, 448),  # compared: memory, 16 bits, bandwidth
    # GeForce: peaks by count. Of the 4090 a published table says the same; of the 50-series what is published (sparse
    # fp4) is sixteen times these 16 bits. Compared beside each: memory, cores, clock, bandwidth.
    _geforce("RTX 5090", 32, 680, 2.407, 1792, lanes=32),  # compared: all
    _geforce("RTX 5080", 16, 336, 2.617, 960, lanes=32),  # compared: all
    _geforce("RTX 5070 Ti", 16, 280, 2.452, 896, lanes=32),  # compared: all
    _geforce("RTX 5070", 12, 192, 2.512, 672, lanes=32),  # compared: memory, clock
    _geforce("RTX 5060 Ti", 16, 144, 2.572, 448),  # compared: all; also sold with 8 GB; PCIe 5.0 x8
    _geforce("RTX 5060", 8, 120, 2.497, 448),  # compared: memory; PCIe 5.0 x8
    _geforce("RTX 4090", 24, 512, 2.52, 1008),  # compared: all
    _geforce("RTX 4080 Super", 16, 320, 2.55, 736),  # compared: memory, cores, bandwidth
    _geforce("RTX 4080", 16, 304, 2.505, 717),  # compared: all
    _geforce("RTX 4070 Ti Super", 16, 264, 2.61, 672),  # not compared
    _geforce("RTX 4070 Ti", 12, 240, 2.61, 504),  # not compared
    _geforce("RTX 4070 Super", 12, 224, 2.475, 504),  # not compared
    _geforce("RTX 4070", 12, 184, 2.475, 504),  # compared: all
    _geforce("RTX 4060 Ti", 16, 136, 2.535, 288, lanes=8),  # compared: cores, clock, bandwidth; also sold with 8 GB
    _geforce("RTX 4060", 8, 96, 2.46, 272, lanes=8),  # not compared
    _geforce("RTX 3090 Ti", 24, 336, 1.86, 1008, fp8=False),  # compared: all
    _geforce("RTX 3090", 24, 328, 1.695, 936, fp8=False),  # compared: number of cores
    _geforce("RTX 3080 Ti", 12, 320, 1.665, 912, fp8=False),  # not compared
    _geforce("RTX 3080", 10, 272, 1.71, 760, fp8=False),  # not compared
    _geforce("RTX 3070 Ti", 8, 192, 1.77, 608, fp8=False),  # not compared
    _geforce("RTX 3070", 8, 184, 1.725, 448, fp8=False),  # compared: memory
    _geforce("RTX 3060 Ti", 8, 152, 1.665, 448, fp8=False),  # not compared
    _geforce("RTX 3060", 12, 112, 1.777, 360, fp8=False),  # compared: all
)

# The three constants that were fitted, to measured steps of the two architectures. Norms, activations, rotations and
# casts move so many times the bytes that a block keeps for its backward pass, in each pass; the backward one is two.
EAGER_TRAFFIC, COMPILED_TRAFFIC = 10.2, 4.9
# Bytes that are moved for each weight that is made a 16-bit one for the length of a product.
DEQUANTISED = 6.5
# Bytes that are moved for each number of a product to round its factors where nothing is compiled: by the one step that
# was measured so (docs/performance.md).
EAGER_ROUNDING = 73
# The same for int8, compiled, by count: the input rotated (written and read, 16 bits), the sum written and read (32).
INT8_TRAFFIC = 12


@dataclass(frozen=True)
class Step:
    """What decides how long a micro-batch takes."""

    keep: float | str | None  # as in train.keep_activations; None without recomputation
    compiled: bool
    format: str | None  # of the frozen base
    attention: str
    preserves: bool = False  # loss.preservation: each pass twice, and once more forwards


def card_called(name: str) -> Card | None:
    """The card of this name, as people or the driver write it; None if it is not known."""
    return next((card for card in CARDS if card.is_called(name)), None)


def seconds(found: Footprint, step: Step, card: Card) -> float | None:
    """Expected time of one micro-batch of LoRA training; None where rates were not measured."""
    rates = card.attained
    if rates is None or step.attention not in rates.attention:
        return None
    if step.format == "int8" and rates.int8_products is None:
        return None
    return _seconds(found, step, card, rates)


def supposed(found: Footprint, step: Step, card: Card) -> float:
    """The same as a guess, for a choice between settings: what was not measured on this card is taken from its data
    sheet, times the share of it that the H100 attains (of int8: that of fp8)."""
    known = card_called("H100")
    assert known is not None
    assert known.attained is not None
    assert known.fp8_products is not None
    like = known.attained
    share, share_of_8_bits = like.products / known.products, like.fp8_products / known.fp8_products
    attained = card.attained or Attained(
        card.products * share,
        (card.fp8_products or 0.0) * share_of_8_bits,
        attention={"flash": tuple(rate / known.products * card.products for rate in like.attention["flash"])},  # type: ignore[dict-item]
    )
    rates = replace(attained, int8_products=attained.int8_products or card.int8_products * share_of_8_bits)
    known_attention = step.attention if step.attention in rates.attention else "flash"
    return _seconds(found, replace(step, attention=known_attention), card, rates)


def _seconds(found: Footprint, step: Step, card: Card, rates: Attained) -> float:
    work, recomputed = found.work(step.keep, step.preserves), step.keep is not None
    in_8_bits = _peak_of_8_bits(step, card) is not None
    forward, backward = rates.attention[step.attention]
    narrow = rates.int8_products if step.format == "int8" else rates.fp8_products
    computing = work.products / (narrow if in_8_bits and narrow else rates.products)
    computing += work.attention_forward / forward + work.attention_backward / backward
    # What is recomputed selectively inside a compiled region is part of its backward pass.
    passes = 3 + (recomputed and not (step.compiled and step.keep != "none"))
    products = 2 + recomputed
    if step.preserves:
        passes, products = 2 * passes + 1, 2 * products + 1
    moved = found.kept(None) * passes * (COMPILED_TRAFFIC if step.compiled else EAGER_TRAFFIC)
    if in_8_bits:
        each = EAGER_ROUNDING * (not step.compiled) + INT8_TRAFFIC * (step.format == "int8")
        moved += found.product_numbers * each * products
    elif step.format is not None:
        linear = sum(kind.count * kind.linear for kind in found.kinds.values())
        moved += linear * DEQUANTISED * products
    return computing / TERA + moved / (card.bandwidth * 1e9)


def floor(found: Footprint, step: Step, card: Card) -> float:
    """Time of one micro-batch at the peaks of the data sheet, attention in 16 bits, nothing else counted."""
    work = found.work(step.keep, step.preserves)
    attention = (work.attention_forward + work.attention_backward) / card.products
    return (work.products / (_peak_of_8_bits(step, card) or card.products) + attention) / TERA


def _peak_of_8_bits(step: Step, card: Card) -> float | None:
    """Peak of the products that a base of this format is multiplied with; None where that is in 16 bits."""
    return {"fp8": card.fp8_products, "int8": card.int8_products}.get(step.format or "")
