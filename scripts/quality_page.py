"""Tables of what scripts/quality.py has measured: docs/defaults.md, and the adapters in docs/adapters.md."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from quality_rows import ATTENTION, BASES, DEFAULTS, ROWS, Row

from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.judging.intervals import t_interval

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- quality: written by python scripts/quality.py -->", "<!-- end of quality -->"
SHOWN = (50, 100, 200, 400, 800)  # steps with a column
LADDER = (800, 400, 200)  # steps at which rows are compared
GOALS = (0.75, 0.80)  # IoU
CHAPTERS = {
    "Losses and noise levels": "loss",
    "Averages": "average",
    "Optimizers": "optimizer",
    "The whole model": "full",
}
ADAPTERS = ("DoRA",)  # rows of docs/adapters.md that also decide about a default
Curves = dict[int, dict[int, dict[str, float]]]  # seed -> steps -> "iou" and "loss"


def curves(written: Mapping[str, Any], base: str, row: Row) -> Curves:
    """What is known of a row; nothing where its settings were others."""
    known = written["runs"].get(base, {}).get(row.name, {})
    if known.get("settings") != list(row.of(base)):
        return {}
    return {int(seed): {int(step): found for step, found in marks.items()} for seed, marks in known["seeds"].items()}


def mean(found: Curves, step: int, what: str = "iou") -> float | None:
    """Mean over the seeds that got so far."""
    values = [marks[step][what] for marks in found.values() if step in marks]
    return float(np.mean(values)) if values else None


def steps_to(found: Curves, before: float, goal: float) -> float | None:
    """Steps after which the mean curve first comes to an IoU, by straight lines between what was measured.

    Args:
        before: IoU of the base.
    """
    steps = sorted({step for marks in found.values() for step in marks})
    points = [(0, before), *((step, value) for step in steps if (value := mean(found, step)) is not None)]
    for (left, low), (right, high) in pairwise(points):
        if low < goal <= high:
            return left + (right - left) * (goal - low) / (high - low)
    return None


def difference(found: Curves, reference: Curves, what: str = "iou") -> tuple[int, list[float]] | None:
    """How far a row lies above the reference of the same seed: where most seeds got to, after the most steps."""
    best: tuple[int, list[float]] | None = None
    for step in LADDER:
        values = [
            marks[step][what] - reference[seed][step][what]
            for seed, marks in found.items() if step in marks and step in reference.get(seed, {})
        ]  # fmt: skip
        if len(values) > (0 if best is None else len(best[1])):
            best = step, values
    return best


def in_words(compared: tuple[int, list[float]] | None) -> str:
    """A difference with its 95 % interval, where there are seeds enough for one."""
    if compared is None:
        return ""
    step, values = compared
    middle, low, high = t_interval(values)
    if math.isinf(low):
        return f"{middle:+.3f} at {step}, one seed"
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f}) at {step}"


def in_steps(steps: float | None) -> str:
    """A number of steps; before the first measurement there is no line to read it from."""
    return "" if steps is None else f"below {SHOWN[0]}" if steps < SHOWN[0] else f"{steps:.0f}"


def number(value: float | None, digits: int = 3) -> str:
    """Blank where nothing is known."""
    return "" if value is None else f"{value:.{digits}f}"


def of_base(written: Mapping[str, Any], base: str, rows: Sequence[Row]) -> Iterator[str]:
    """The table of a base."""
    before = written["before"].get(base, {}).get("iou", 0.0)
    reference = curves(written, base, DEFAULTS)
    goals = [f"steps to {goal:.2f}" for goal in GOALS]
    columns = (f"`{BASES[base]}`", *map(str, SHOWN), "against our defaults", *goals, "loss at 200", "seeds")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        found = curves(written, base, row)
        cells = [row.name, *(number(mean(found, step)) for step in SHOWN)]
        cells.append("" if row is DEFAULTS else in_words(difference(found, reference)))
        cells += [in_steps(steps_to(found, before, goal)) for goal in GOALS]
        cells += [number(mean(found, 200, "loss")), str(len(found) or "")]
        yield f"| {' | '.join(cells)} |".replace("  ", " ")


def of_peers(written: Mapping[str, Any]) -> Iterator[str]:
    """How many of our steps do what a peer's do, with either default for the layers."""
    columns = ("base", "trainer", "steps there", "IoU", "our defaults have it after", "half the steps",
               "with attention alone", "half the steps")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for base, title in BASES.items():
        for row in (row for row in ROWS if row.kind == "peer"):
            found = curves(written, base, row)
            for step in SHOWN[1:]:
                if (value := mean(found, step)) is not None:
                    ours = [cell for one in (DEFAULTS, ATTENTION) for cell in reached(written, base, one, step, value)]
                    yield f"| `{title}` | {row.name} | {step} | {value:.3f} | {' | '.join(ours)} |".replace("  ", " ")


def reached(written: Mapping[str, Any], base: str, row: Row, step: int, value: float) -> tuple[str, str]:
    """After how many steps a row has an IoU, and whether these are half of `step`; blank if that was not measured."""
    found = curves(written, base, row)
    if not found:
        return "", ""
    ours = steps_to(found, written["before"][base]["iou"], value)
    if ours is None:
        longest = max(step for marks in found.values() for step in marks)
        return f"not in {longest} steps", "no" if longest >= step / 2 else ""
    return f"{in_steps(ours)} steps", "yes" if ours <= step / 2 else "no"


def spread(written: Mapping[str, Any]) -> Iterator[str]:
    """What chance alone does."""
    for base, title in BASES.items():
        found = curves(written, base, DEFAULTS)
        values = [marks[200]["iou"] for marks in found.values() if 200 in marks]
        if len(values) > 1:
            yield (f"Our defaults with {len(values)} seeds on `{title}` lie between {min(values):.3f} and "
                   f"{max(values):.3f} at 200 steps: of one seed, a smaller difference says nothing.")  # fmt: skip


def of_adapters(written: Mapping[str, Any]) -> Iterator[str]:
    """The section of docs/adapters.md."""
    yield from side_by_side(written, [row for row in ROWS if row.kind == "adapter" or row.name in ADAPTERS])


def side_by_side(written: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Rows after 200 steps, both bases in one table, beside our defaults."""
    known = [
        row for row in rows if any(200 in marks for base in BASES for marks in curves(written, base, row).values())
    ]
    if known:
        titles = " | ".join(f"`{title}` | against our defaults" for title in BASES.values())
        yield f"| IoU after 200 steps | {titles} |"
        yield "|---" * (1 + 2 * len(BASES)) + "|"
        for row in (DEFAULTS, *known):
            cells = [row.name]
            for base in BASES:
                found = curves(written, base, row)
                compared = in_words(difference(found, curves(written, base, DEFAULTS)))
                cells += [number(mean(found, 200)), "" if row is DEFAULTS else compared]
            yield f"| {' | '.join(cells)} |".replace("  ", " ")
        yield ""
    yield from unknown(rows, known)


def unknown(rows: Sequence[Row], known: Sequence[Row]) -> Iterator[str]:
    """Which rows nobody has measured."""
    if names := [row.name for row in rows if row not in known]:
        yield f"Not measured yet: {'; '.join(names)}."


def tables(written: Mapping[str, Any]) -> Iterator[str]:
    """The section of docs/defaults.md."""
    rows = [row for row in ROWS if row.decides]
    known = [row for row in rows if any(curves(written, base, row) for base in BASES)]
    for base in BASES:
        yield from (*of_base(written, base, known), "")
    yield from (*unknown(rows, known), "")
    yield from (*(line + "\n" for line in spread(written)), "### Half the steps?", "")
    yield from (*of_peers(written), "")
    yield "Where their settings come from; rates are multiplied by 40, as ours is for these bases:"
    yield from ("", *(f"- {row.name}: {row.words}." for row in rows if row.words))
    for heading, kind in CHAPTERS.items():
        yield from ("", f"### {heading}", "", *side_by_side(written, [row for row in ROWS if row.kind == kind]))


def with_section(text: str, lines: Iterator[str]) -> str:
    """A page with its section written anew."""
    before, _, rest = text.partition(BEGIN)
    section = re.sub("\n{3,}", "\n\n", "\n".join(lines).rstrip())
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{rest.partition(END)[2]}"


def write(written: Mapping[str, Any]) -> None:
    """Write both pages."""
    for page, lines in ((DOCS / "defaults.md", tables(written)), (DOCS / "adapters.md", of_adapters(written))):
        write_atomic(page, with_section(page.read_text(encoding="utf-8"), lines))
