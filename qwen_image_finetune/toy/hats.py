"""Hats, in the coordinates of the face below them. Each is painted over the hair, with the label it is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image

from qwen_image_finetune.toy.canvas import Canvas, Colour, between, hsv, line, oval, shade

Hat = Callable[[Canvas, Generator, int, float], None]  # the float is half the width of the head
Chosen = Callable[[Canvas, int, float], None]  # a hat whose random numbers are known


def _cloth(rng: Generator) -> Colour:
    return hsv(rng.random(), rng.uniform(0.45, 0.95), rng.uniform(0.4, 0.95))


def _beanie(canvas: Canvas, rng: Generator, part: int, width: float) -> None:
    cloth, top = _cloth(rng), rng.uniform(0.75, 0.95)
    if rng.random() < 0.6:
        canvas.fill(oval(0, -0.55 - top, 0.18, 0.18), shade(cloth, 1.5), part)
    canvas.fill(oval(0, -0.5, width + 0.12, top, 0.5, 1.0), cloth, part)
    for x in np.linspace(-0.6, 0.6, 5):
        canvas.stroke(line((x * width * 1.3, -0.65), (x * width * 0.7, -0.4 - top * 0.75)), shade(cloth, 0.85), 0.03)
    band = line((-width - 0.16, -0.68), (width + 0.16, -0.68), (width + 0.15, -0.4), (-width - 0.15, -0.4))
    canvas.fill(band, shade(cloth, 0.75), part)


def _cap(canvas: Canvas, rng: Generator, part: int, width: float) -> None:
    cloth, side = _cloth(rng), rng.choice([-1, 1])
    canvas.fill(oval(0, -0.5, width + 0.1, 0.72, 0.5, 1.0), cloth, part)
    canvas.stroke(oval(0, -0.5, width * 0.4, 0.7, 0.5, 1.0), shade(cloth, 0.8), 0.025)
    canvas.fill(oval(0, -1.21, 0.07, 0.05), shade(cloth, 0.7), part)
    brim = oval(side * width * 0.55, -0.5, width * 1.05, 0.17)
    canvas.fill(brim, shade(cloth, 0.68), part)
    canvas.fill(oval(0, -0.78, 0.17, 0.14), shade(cloth, 1.6))


def _top_hat(canvas: Canvas, rng: Generator, part: int, width: float) -> None:
    cloth = hsv(rng.random(), rng.uniform(0.1, 0.6), rng.uniform(0.12, 0.4))
    height, ribbon = rng.uniform(1.35, 1.6), _cloth(rng)
    crown = line((-width * 0.82, -height), (width * 0.82, -height), (width * 0.76, -0.6), (-width * 0.76, -0.6))
    canvas.fill(crown, cloth, part)
    canvas.fill(oval(0, -height, width * 0.82, 0.1), shade(cloth, 1.12), part)
    canvas.fill(
        line((-width * 0.77, -0.86), (width * 0.77, -0.86), (width * 0.76, -0.6), (-width * 0.76, -0.6)), ribbon
    )
    canvas.fill(oval(0, -0.58, width + 0.32, 0.13), shade(cloth, 0.8), part)


def _straw_hat(canvas: Canvas, rng: Generator, part: int, width: float) -> None:
    straw, ribbon = hsv(rng.uniform(0.09, 0.14), rng.uniform(0.3, 0.6), rng.uniform(0.75, 0.95)), _cloth(rng)
    canvas.fill(oval(0, -0.55, width + 0.62, 0.22), shade(straw, 0.85), part)
    canvas.fill(oval(0, -0.62, width * 0.95, 0.62, 0.5, 1.0), straw, part)
    low, high = oval(0, -0.6, width * 0.95, 0.1, 0.5, 0.0), oval(0, -0.78, width * 0.93, 0.1, 0.5, 0.0)
    canvas.fill(between(high, low), ribbon, part)
    for radius in (0.2, 0.42):
        canvas.stroke(oval(0, -0.55, width + radius, 0.2 * radius / 0.6 + 0.03, 0.03, 0.47), shade(straw, 0.72), 0.02)


def _party_hat(canvas: Canvas, rng: Generator, part: int, width: float) -> None:
    cloth, dots, tip = _cloth(rng), _cloth(rng), rng.uniform(1.7, 1.95)
    base = oval(0, -0.72, width * 0.72, 0.12, 0.5, 0.0)
    canvas.fill(between(line((-0.02, -tip), (0.02, -tip)), base), cloth, part)
    for x, y in ((-0.25, -0.85), (0.15, -0.95), (-0.08, -1.15), (0.3, -0.75), (0.06, -1.38)):
        canvas.fill(oval(x * width * 1.2, y, 0.065, 0.065), dots)
    canvas.fill(oval(0, -tip, 0.13, 0.13), shade(dots, 1.3), part)


HATS: tuple[Hat, ...] = (_beanie, _cap, _top_hat, _straw_hat, _party_hat)


def plain_hat(canvas: Canvas, part: int, width: float) -> None:
    """A red top hat with a black ribbon, the same on every head."""
    red, dark = (214, 40, 48), (30, 24, 28)
    crown = line((-width * 0.82, -1.5), (width * 0.82, -1.5), (width * 0.78, -0.6), (-width * 0.78, -0.6))
    canvas.fill(crown, red, part)
    ribbon = line((-width * 0.79, -0.84), (width * 0.79, -0.84), (width * 0.78, -0.6), (-width * 0.78, -0.6))
    canvas.fill(ribbon, dark)
    canvas.fill(oval(0, -0.58, width + 0.32, 0.13), red, part)


def chosen_hat(kind: int, seed: list[int]) -> Chosen:
    """One hat of HATS, the same wherever it is painted."""
    return lambda canvas, part, width: HATS[kind](canvas, np.random.default_rng(seed), part, width)


def draw_hat(hat: Chosen, size: int, background: Colour) -> Image.Image:
    """A hat alone, upright in the middle; RGB, `size` x `size` pixels."""
    canvas = Canvas(size, background)
    canvas.place(0.5, 0.82, 0.34, 0.0)
    hat(canvas, 1, 0.77)
    return canvas.finish()[0]
