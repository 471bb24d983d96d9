"""A picture and its label map, painted together in coordinates that may be moved, turned and scaled."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]  # RGB, 0 to 255
Points = NDArray[np.float64]  # (n, 2): x to the right, y down
OVERSAMPLING = 4  # painted this much larger, then averaged: smooth edges without an antialiasing library


class Canvas:
    """Paints into the picture, and where a part is named, into the labels too."""

    def __init__(self, size: int, colour: Colour) -> None:
        self.size = size
        self.pixels = size * OVERSAMPLING
        self.picture = Image.new("RGB", (self.pixels, self.pixels), colour)
        self.labels = Image.new("L", (self.pixels, self.pixels), 0)
        self._picture, self._labels = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.labels)
        self.tint: Colour | None = None  # while it is set, everything is painted in this colour
        self.place(0.0, 0.0, 1.0, 0.0)

    def place(self, x: float, y: float, scale: float, angle: float) -> None:
        """From now on the origin lies at (x, y), `scale` is the length of one unit, all in shares of the side.

        Args:
            angle: clockwise turn of what is painted, in radians.
        """
        cosine, sine = math.cos(angle), math.sin(angle)
        self._matrix = np.array([[cosine, sine], [-sine, cosine]]) * scale * self.pixels
        self._offset = np.array([x, y]) * self.pixels
        self._unit = scale * self.pixels

    def fill(self, points: Points, colour: Colour, part: int | None = None) -> None:
        """Fill a closed outline; `part` is the label it gets, None leaves the labels as they are."""
        corners = [(float(x), float(y)) for x, y in points @ self._matrix + self._offset]
        self._picture.polygon(corners, fill=self.tint or colour)
        if part is not None:
            self._labels.polygon(corners, fill=part)

    def stroke(self, points: Points, colour: Colour, width: float) -> None:
        """Draw an open line with round ends into the picture alone; `width` in units."""
        corners = [(float(x), float(y)) for x, y in points @ self._matrix + self._offset]
        pixels = max(1, round(width * self._unit))
        colour = self.tint or colour
        self._picture.line(corners, fill=colour, width=pixels, joint="curve")
        radius = pixels / 2
        for x, y in (corners[0], corners[-1]):
            self._picture.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def finish(self) -> tuple[Image.Image, NDArray[np.uint8]]:
        """The picture at its size and the labels (size, size), each taken whole from one painted pixel."""
        picture = self.picture.resize((self.size, self.size), Image.Resampling.BOX)
        labels = np.asarray(self.labels)[OVERSAMPLING // 2 :: OVERSAMPLING, OVERSAMPLING // 2 :: OVERSAMPLING]
        return picture, labels.copy()


def oval(x: float, y: float, radius_x: float, radius_y: float, start: float = 0.0, end: float = 1.0) -> Points:
    """An ellipse or an arc of it; `start` and `end` in turns, clockwise from the right."""
    angles = np.linspace(start, end, 49) * 2 * math.pi
    return np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1)


def line(*corners: tuple[float, float]) -> Points:
    """The points given, as an array."""
    return np.array(corners, dtype=np.float64)


def between(upper: Points, lower: Points) -> Points:
    """The area between two lines that both run from left to right."""
    return np.concatenate([upper, lower[::-1]])


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Colour from its hue (any number, in turns), saturation and value (0 to 1)."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def shade(colour: Colour, factor: float) -> Colour:
    """Darker (factor below 1) or lighter (above 1, towards white)."""
    if factor <= 1:
        red, green, blue = (round(channel * factor) for channel in colour)
    else:
        red, green, blue = (round(255 - (255 - channel) * (2 - factor)) for channel in colour)
    return red, green, blue
