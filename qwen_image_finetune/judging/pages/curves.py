"""Curves of a page: the numbers go into the file, and charts.js draws them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

MOST_POINTS = 2000  # of one line: more than that no screen shows, and a page has to be opened
COLOURS = 8  # that the style sheet has


@dataclass(frozen=True)
class Series:
    """One line."""

    name: str
    points: Sequence[tuple[float, float]]  # (step, value), steps rising
    colour: int = 0
    smooth: bool = False  # draw the points faintly, and their moving mean over them
    band: Sequence[tuple[float, float, float]] = ()  # (step, low, high)


@dataclass(frozen=True)
class Curve:
    """All series on the same axes."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    zero: bool = False  # show where the value is 0


def charts(curves: Sequence[Curve]) -> str:
    """The curves that have points, as HTML; values that are not finite are left out."""
    drawn = [found for found in map(_numbers, curves) if found["series"]]
    # Inside a script element text ends at "</", whatever it stands in.
    text = json.dumps(drawn, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    return f'<div class="charts"><script type="application/json">{text}</script></div>' if drawn else ""


def legend(names: Sequence[str]) -> str:
    """Which colour is whose."""
    key = "".join(f'<span><i class="c{place % COLOURS}"></i>{escape(name)}</span>' for place, name in enumerate(names))
    return f'<div class="legend">{key}</div>'


def _numbers(curve: Curve) -> dict[str, Any]:
    series = []
    for each in curve.series:
        points = thinned([point for point in each.points if math.isfinite(point[1])])
        band = [ends for ends in each.band if all(map(math.isfinite, ends))]
        if points:
            series.append({"name": each.name, "colour": each.colour % COLOURS, "smooth": each.smooth, "points": points,
                           "band": band})  # fmt: skip
    return {"title": curve.title, "unit": curve.unit, "zero": curve.zero, "series": series}


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: means of neighbours."""
    size = max(-(-len(points) // MOST_POINTS), 1)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in g) / len(g), sum(value for _, value in g) / len(g)) for g in groups]
