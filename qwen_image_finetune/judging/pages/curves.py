"""Curves as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 22  # margins of the drawing area
MOST_POINTS = 400  # of one line: more than that a screen does not show
COLOURS = 6  # that the style sheet has
TICKS = 4  # steps between the lines across, about


@dataclass(frozen=True)
class Series:
    """One line."""

    name: str
    points: Sequence[tuple[float, float]]  # (step, value), steps rising
    colour: int = 0
    smooth: bool = False  # draw the points faintly, and their moving mean over them
    band: Sequence[tuple[float, float, float]] = ()  # (step, low, high)


def curve(title: str, series: Sequence[Series], zero: bool = False) -> str:
    """A figure with all series on the same axes; values that are not finite are left out.

    Args:
        zero: show where the value is 0.
    """
    lines = [(each, _finite(each.points)) for each in series]
    lines = [(each, points) for each, points in lines if points]
    if not lines:
        return ""
    steps = [step for _, points in lines for step, _ in points]
    values = [value for _, points in lines for _, value in points]
    values += [end for each, _ in lines for band in each.band for end in band[1:] if math.isfinite(end)]
    ticks = nice_ticks(min(values + [0.0] * zero), max(values + [0.0] * zero))
    first, last = min(steps), max(steps)
    low, high = min(ticks[0], *values), max(ticks[-1], *values)

    def x(step: float) -> float:  # a single step stands in the middle
        place = (step - first) / (last - first) if last > first else 0.5
        return LEFT + place * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    drawn = []
    for tick in ticks:
        drawn.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    ends_of_axis = ((first, "start"), (last, "end")) if last > first else ((first, "middle"),)
    for step, anchor in ends_of_axis:
        drawn.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{_number(step)}</text>')
    if last > first:
        drawn.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for each, points in lines:
        colour = f"var(--c{each.colour % COLOURS})"
        band = [(step, bottom, top) for step, bottom, top in each.band if math.isfinite(bottom) and math.isfinite(top)]
        if len(band) > 1:
            outline = [(step, top) for step, _, top in band] + [(step, bottom) for step, bottom, _ in reversed(band)]
            drawn.append(f'<polygon class="band" fill="{colour}" points="{path(outline)}"/>')
        for step, bottom, top in band if len(band) <= 12 else []:
            ends = f'x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{y(bottom):.1f}" y2="{y(top):.1f}"'
            drawn.append(f'<line stroke="{colour}" {ends}/>')
        if each.smooth and len(points) > 20:
            drawn.append(f'<polyline class="series faint" stroke="{colour}" points="{path(thinned(points))}"/>')
        line = moving_mean(points) if each.smooth and len(points) > 20 else points
        drawn.append(f'<polyline class="series" stroke="{colour}" points="{path(thinned(line))}"/>')
        if len(points) <= 12:
            drawn += [f'<circle fill="{colour}" r="2.5" cx="{x(step):.1f}" cy="{y(v):.1f}"/>' for step, v in points]
    ends = "; ".join(f"{each.name} {_number(points[0][1])} to {_number(points[-1][1])}" for each, points in lines)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {ends}")}">{"".join(drawn)}</svg></figure>'
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Round values that span [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if high == low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(begin, end + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: means of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in g) / len(g), sum(value for _, value in g) / len(g)) for g in groups]


def moving_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a window of a twentieth of the points, centred; shorter at the ends."""
    reach = max(len(points) // 40, 2)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for place, (step, _) in enumerate(points):
        begin, end = max(place - reach, 0), min(place + reach + 1, len(points))
        smoothed.append((step, (sums[end] - sums[begin]) / (end - begin)))
    return smoothed


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
