"""Scenes behind a face; all of them are background to the mask."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from qwen_image_finetune.toy.canvas import Canvas, between, hsv, line, oval, shade


def paint_background(canvas: Canvas, rng: Generator) -> None:
    """One of five scenes, each in colours of its own. The canvas must still be at its first place."""
    scenes = (_gradient, _lights, _stripes, _hills, _room)
    scenes[rng.integers(len(scenes))](canvas, rng)


def _gradient(canvas: Canvas, rng: Generator) -> None:
    hue, other = rng.random(), rng.uniform(-0.15, 0.15)
    saturation, value = rng.uniform(0.15, 0.7), rng.uniform(0.5, 0.95)
    for y in np.linspace(0, 1, 65):
        band = line((0, y - 0.02), (1, y - 0.02), (1, 1), (0, 1))
        canvas.fill(band, hsv(hue + other * y, saturation, value * (1 - 0.45 * y)))


def _lights(canvas: Canvas, rng: Generator) -> None:
    """Circles out of focus."""
    hue = rng.random()
    canvas.fill(line((0, 0), (1, 0), (1, 1), (0, 1)), hsv(hue, rng.uniform(0.3, 0.8), rng.uniform(0.15, 0.5)))
    for _ in range(rng.integers(8, 20)):
        x, y, radius = rng.random(), rng.random(), rng.uniform(0.02, 0.11)
        colour = hsv(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.2, 0.7), rng.uniform(0.4, 0.9))
        canvas.fill(oval(x, y, radius, radius), colour)


def _stripes(canvas: Canvas, rng: Generator) -> None:
    hue, saturation, value = rng.random(), rng.uniform(0.1, 0.6), rng.uniform(0.6, 0.95)
    canvas.fill(line((0, 0), (1, 0), (1, 1), (0, 1)), hsv(hue, saturation, value))
    lean, width = rng.uniform(-0.6, 0.6), rng.uniform(0.05, 0.12)
    for x in np.arange(-1, 2, 2 * width):
        canvas.fill(
            line((x, 0), (x + width, 0), (x + width + lean, 1), (x + lean, 1)), hsv(hue, saturation, value * 0.85)
        )


def _hills(canvas: Canvas, rng: Generator) -> None:
    """A landscape under a sky with a sun."""
    for y in np.linspace(0, 0.7, 33):
        canvas.fill(line((0, y - 0.02), (1, y - 0.02), (1, 1), (0, 1)), hsv(0.57, 0.5 - 0.45 * y, 0.85 + 0.15 * y))
    x, y, radius = rng.uniform(0.05, 0.95), rng.uniform(0.06, 0.25), rng.uniform(0.04, 0.08)
    canvas.fill(oval(x, y, radius, radius), (255, 236, 150))
    across = np.linspace(0, 1, 65)
    for depth in range(3):
        height = 0.55 + 0.13 * depth
        waves = 0.06 * np.sin(across * rng.uniform(3, 9) + rng.uniform(0, 6)) + height
        colour = hsv(rng.uniform(0.2, 0.42), 0.35 + 0.12 * depth, 0.75 - 0.14 * depth)
        canvas.fill(between(np.stack([across, waves], axis=1), line((0, 1), (1, 1))), colour)


def _room(canvas: Canvas, rng: Generator) -> None:
    """A wall with a window or pictures, and the floor."""
    wall = hsv(rng.random(), rng.uniform(0.08, 0.35), rng.uniform(0.65, 0.95))
    canvas.fill(line((0, 0), (1, 0), (1, 1), (0, 1)), wall)
    for _ in range(rng.integers(1, 4)):
        x, y, width, height = rng.uniform(0, 0.85), rng.uniform(0.04, 0.4), rng.uniform(0.1, 0.3), rng.uniform(0.1, 0.3)
        for margin, colour in ((0.0, shade(wall, 0.6)), (0.02, hsv(rng.random(), 0.45, rng.uniform(0.5, 0.95)))):
            left, top, right, bottom = x + margin, y + margin, x + width - margin, y + height - margin
            canvas.fill(line((left, top), (right, top), (right, bottom), (left, bottom)), colour)
    floor = rng.uniform(0.72, 0.88)
    canvas.fill(line((0, floor), (1, floor), (1, 1), (0, 1)), hsv(rng.uniform(0.04, 0.12), 0.45, rng.uniform(0.3, 0.6)))
