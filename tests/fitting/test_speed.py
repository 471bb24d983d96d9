"""Step times: predicted against measured, the floor by hand, and cards found by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_image_finetune.fitting.footprint import Footprint
from qwen_image_finetune.fitting.speed import CARDS, Step, card_called, floor, seconds

# Measured on an H100 80GB HBM3 with torch 2.11 on a prototype of these levers: r 16, 8704 tokens.
# (family, base, compiled, keep, attention, milliseconds)
MEASURED: list[tuple[str, str | None, bool, Any, str, int]] = [
    ("FluxKontext", None, False, "none", "flash", 1722),
    ("FluxKontext", "nf4", False, "none", "flash", 1788),
    ("FluxKontext", None, True, "none", "flash", 1440),
    ("FluxKontext", "fp8", True, "none", "flash", 1251),
    ("FluxKontext", "fp8", True, "none", "flash4", 860),
    ("FluxKontext", "fp8", True, 0.0, "flash4", 718),
    ("FluxKontext", "fp8", True, 1.0, "flash4", 650),
    ("QwenImageEdit", None, False, "none", "flash", 1869),
    ("QwenImageEdit", None, True, "none", "flash", 1543),
    ("QwenImageEdit", "fp8", True, "none", "flash", 1362),
]


@pytest.mark.parametrize(("family", "format", "compiled", "keep", "attention", "measured"), MEASURED)
def test_prediction_against_measured_steps(
    family: str,
    format: str | None,
    compiled: bool,
    keep: Any,
    attention: str,
    measured: int,
    full_size: dict[str, Footprint],
) -> None:
    card = card_called("H100")
    assert card is not None
    step = Step(keep, compiled, format, attention)
    expected = seconds(full_size[family], step, card)
    assert expected is not None
    print(
        f"{family} {step}: predicted {1e3 * expected:.0f} ms, measured {measured}: {1e3 * expected / measured - 1:+.1%}"
    )
    assert 1e3 * expected == pytest.approx(measured, rel=0.03)
    assert floor(full_size[family], step, card) < expected


def test_floor_by_hand(full_size: dict[str, Footprint]) -> None:
    """Twelve square products of 3072 in each stream's blocks, 8704 tokens, 60 blocks; attention is 4 tokens^2 width."""
    card = card_called("NVIDIA A100-SXM4-40GB")
    assert card is not None
    products, attention = 2 * 12 * 3072**2 * 8704 * 60, 4 * 8704**2 * 3072 * 60
    expected = (3 * products + 4.5 * attention) / 312e12
    found = full_size["QwenImageEdit"]
    assert floor(found, Step("none", False, "fp8", "flash"), card) == pytest.approx(expected, rel=0.01)
    assert seconds(found, Step("none", False, "fp8", "flash"), card) is None


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx 3090", "RTX 3090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("4090", "RTX 4090"),
        ("3090", "RTX 3090"),
        ("80", None),
        ("24GB", None),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX A2000", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("RTX4090", "RTX 4090"),
        ("4070", "RTX 4070"),
        ("4060Ti", "RTX 4060 Ti"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 2080 Ti", None),
        ("Radeon", None),
    ],
)
def test_cards_are_found_by_name(called: str, name: str | None) -> None:
    card = card_called(called)
    assert (card and card.name) == name


def test_every_card_is_found_by_its_own_name() -> None:
    for card in CARDS:
        assert card_called(card.name) == card_called(f"NVIDIA GeForce {card.name}") == card


def test_the_page_names_the_cards_that_are_known() -> None:
    page = (Path(__file__).parents[2] / "docs/performance.md").read_text(encoding="utf-8")
    named = page.partition("Known by name are:\n\n")[2].partition(".\n\n")[0].replace("\n", " ").split(", ")
    assert named == [card.name for card in CARDS]


def test_what_is_counted_for_geforce_is_what_is_published() -> None:
    """The whitepapers say 165.2, 330.3 and 660.6 of the 4090, 71 and 284 of the 3090; the 50-series is published as
    sparse fp4, sixteen times the 16 bits."""
    for name, factor, published in [("RTX 4090", 1, 165.2), ("RTX 3090", 1, 71.2), ("RTX 5080", 16, 1801),
                                    ("RTX 5070", 16, 988), ("RTX 5060 Ti", 16, 759)]:  # fmt: skip
        card = card_called(name)
        assert card is not None
        assert factor * card.products == pytest.approx(published, rel=0.003)
        assert card.int8_products == 4 * card.products
        assert card.fp8_products == (None if name == "RTX 3090" else 2 * card.products)


def test_no_card_attains_more_than_its_peak() -> None:
    for card in CARDS:
        if card.attained is not None and card.fp8_products is not None:
            assert card.attained.products < card.products and card.attained.fp8_products < card.fp8_products
            assert all(rate < card.products for pair in card.attained.attention.values() for rate in pair)
