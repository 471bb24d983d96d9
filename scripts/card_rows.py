"""What scripts/card.py measures, in order of worth, and the time that each row may take."""

from __future__ import annotations

import dataclasses

TESTS = "tests/gpu"
BASELINE = "baseline"  # the one of `qif bench`
PLANNED = "auto"  # the settings are the planner's
EAGER = (BASELINE, "fp8-swapped")  # of the variants below; all others are compiled
# Seconds that a row takes on a card, for whether to begin it, and its share, after which it is given up for this call:
# random weights, compiling, steps. One that is tried again has twice that.
SHARES = {"tests": (120, 180), "eager": (45, 90), "compiled": (90, 180)}
TINY = (3, 60)  # of tiny models, nothing compiled


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    family: str  # or TESTS
    variant: str = ""  # of `qif bench`, or PLANNED
    side: int = 1024  # of target and reference, in pixels
    batch: int = 1
    cap: int | None = None  # GiB that the card is taken to have
    deterministic: bool = False
    ratio: float | None = None  # to the baseline: the goal
    peak: float | None = None  # GiB, the goal

    @property
    def name(self) -> str:
        """What it is called in the file."""
        extra = [f"{self.side} pixels"] * (self.side != 1024) + [f"batch {self.batch}"] * (self.batch != 1)
        extra += [f"{self.cap} GiB"] * (self.cap is not None) + ["deterministic"] * self.deterministic
        return " ".join([self.family, self.variant, *extra]).strip()

    @property
    def beside(self) -> Row:
        """The baseline that it is compared with."""
        return Row(self.family, BASELINE, self.side, self.batch)

    def seconds(self, tiny: bool) -> tuple[int, int]:
        """What to expect of it, and its share."""
        if tiny:
            return TINY
        return SHARES["tests" if self.family == TESTS else "eager" if self.variant in EAGER else "compiled"]


KONTEXT, QWEN = "FluxKontext", "QwenImageEdit"
ROWS = (
    Row(TESTS),
    Row(KONTEXT, BASELINE),
    Row(KONTEXT, "fp8-kept", ratio=2.6, peak=19),
    Row(KONTEXT, "fp8-free", ratio=3.0, peak=50),
    Row(KONTEXT, "int8-kept", ratio=2.2, peak=19),
    Row(QWEN, BASELINE),
    Row(QWEN, "fp8-kept", ratio=2.6, peak=28),
    Row(QWEN, "fp8-free", ratio=2.7, peak=70),
    Row(QWEN, "int8-kept"),
    *(Row(family, PLANNED, cap=cap, peak=cap) for cap in (24, 16, 12, 8) for family in (KONTEXT, QWEN)),
    Row(KONTEXT, "fp8", ratio=2.1, peak=17),
    Row(KONTEXT, "kept"),
    Row(KONTEXT, "nf4", ratio=1.6, peak=9),
    Row(KONTEXT, "fp8-offloaded"),
    Row(KONTEXT, "fp8-swapped"),
    *(Row(family, variant) for family in ("Flux2Klein", "QwenImage21")
      for variant in (BASELINE, PLANNED, "free", "kept", "fp8-free", "fp8-kept")),
    *(Row(KONTEXT, variant, side=512) for variant in (BASELINE, "fp8-free", "int8-free", "free")),
    *(Row(KONTEXT, variant, batch=4) for variant in (BASELINE, "fp8-kept")),
    Row(KONTEXT, "fp8-kept", deterministic=True),
)  # fmt: skip
