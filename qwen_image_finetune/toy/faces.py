"""Drawn faces and the segmentation masks of their parts: a task with a right answer, in any number, from a seed.

In the coordinates of a face its centre is the origin, the chin lies at y = 1 and the crown at y = -1.
"""

from __future__ import annotations

import copy
import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from qwen_image_finetune.toy.backgrounds import paint_background
from qwen_image_finetune.toy.canvas import Canvas, Colour, Points, between, hsv, line, oval, shade
from qwen_image_finetune.toy.hats import HATS, Chosen, plain_hat

# Far from each other and from every mixture of two neighbours, so that a blurred prediction still has a nearest class.
PALETTE: dict[str, Colour] = {
    "background": (0, 0, 0),
    "face": (255, 200, 0),
    "hair": (0, 60, 255),
    "eyes": (0, 255, 255),
    "mouth": (255, 0, 60),
    "hat": (0, 220, 60),
}
BACKGROUND, FACE, HAIR, EYES, MOUTH, HAT = range(len(PALETTE))

SKINS: tuple[Colour, ...] = (
    (255, 224, 206),
    (250, 208, 176),
    (236, 188, 150),
    (222, 166, 122),
    (198, 136, 92),
    (160, 104, 66),
    (122, 76, 48),
    (92, 58, 40),
)
HAIRS: tuple[Colour, ...] = (
    (28, 24, 26),
    (58, 38, 28),
    (104, 64, 38),
    (150, 94, 48),
    (222, 180, 104),
    (188, 84, 40),
    (150, 150, 156),
    (226, 222, 214),
    (196, 88, 150),
    (60, 130, 150),
)
STYLES = ("bald", "short", "short", "bob", "long", "pigtails", "afro", "spikes", "bun")
STYLES_UNDER_HATS = ("bald", "short", "bob", "long", "pigtails")


class Features(NamedTuple):
    """What the parts of one face share."""

    skin: Colour
    hair: Colour
    style: str  # one of STYLES
    width: float  # of the head, from its middle
    chin: float  # 0 is an oval; larger is more pointed
    fringe: float  # y of the hairline in the middle
    parting: float  # -1 to 1, where the fringe is highest


class Wish(NamedTuple):
    """What one face shall have, whatever its random numbers say; None leaves it to them."""

    background: Colour | None = None  # one flat colour
    hair: Colour | None = None
    skin: Colour | None = None
    glasses: Literal["none", "plain"] | None = None  # plain: dark lenses, the same on everybody
    shirt: Colour | None = None
    hat: Literal["none", "any", "plain"] | Chosen | None = None  # plain: the same hat on everybody
    hat_colour: Colour | None = None  # of the whole hat, ribbon and all
    hairy: bool = False  # nobody is bald


AS_DRAWN = Wish()


def draw_face(rng: Generator, size: int, wish: Wish = AS_DRAWN) -> tuple[Image.Image, Image.Image]:
    """A face and its segmentation mask, both RGB and `size` x `size` pixels.

    The mask holds the colours of PALETTE and no others. The same state of `rng` gives the same picture at every size,
    and with another wish the same picture but for what the wish names; a hat that is named, even as "none", also
    restricts the hair to styles that go under one.
    """
    canvas = Canvas(size, (0, 0, 0))
    paint_background(canvas, rng)
    if wish.background:
        canvas.fill(line((0, 0), (1, 0), (1, 1), (0, 1)), wish.background)
    scale = rng.uniform(0.2, 0.3)
    angle = math.radians(rng.uniform(-12, 12))
    canvas.place(rng.uniform(0.36, 0.64), rng.uniform(0.46, 0.58), scale, angle)

    hat = HATS[rng.integers(len(HATS))] if rng.random() < 0.45 else None
    styles: tuple[str, ...] = STYLES_UNDER_HATS if hat or wish.hat else STYLES
    if wish.hairy:
        styles = tuple(style for style in styles if style != "bald")
    skin = SKINS[rng.integers(len(SKINS))]
    hairs = [hair for hair in HAIRS if math.dist(hair, skin) > 75]  # or nobody could tell where the hair begins
    hair = hairs[rng.integers(len(hairs))]
    look = Features(
        skin=wish.skin or skin,
        hair=wish.hair or hair,
        style=styles[rng.integers(len(styles))],
        width=rng.uniform(0.7, 0.84),
        chin=rng.uniform(0.05, 0.3),
        fringe=rng.uniform(-0.72, -0.45),
        parting=rng.uniform(-0.8, 0.8),
    )
    _hair_behind(canvas, look)
    _body(canvas, rng, look, wish.shirt)
    _head(canvas, rng, look)
    _eyes(canvas, rng, look)
    _nose(canvas, rng, look)
    _beard(canvas, rng, look)
    _mouth(canvas, rng, look)
    _hair_in_front(canvas, rng, look)
    # What is not wished for is painted elsewhere all the same: the numbers after it must stay the ones they are.
    elsewhere = Canvas(8, (0, 0, 0))
    if rng.random() < 0.35:
        _glasses(elsewhere if wish.glasses else canvas, rng, look)
    if wish.glasses == "plain":
        _plain_glasses(canvas, look)
    canvas.tint = wish.hat_colour
    if hat:
        hat(canvas if wish.hat in (None, "any") else elsewhere, rng, HAT, look.width)
    elif wish.hat == "any":
        other = copy.deepcopy(rng)
        HATS[other.integers(len(HATS))](canvas, other, HAT, look.width)
    if wish.hat == "plain":
        plain_hat(canvas, HAT, look.width)
    elif callable(wish.hat):
        wish.hat(canvas, HAT, look.width)
    picture, labels = canvas.finish()
    return _light(picture, rng), Image.fromarray(np.array(list(PALETTE.values()), dtype=np.uint8)[labels])


def classes(mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Index in PALETTE of the nearest colour, (..., 3) -> (...); also for masks a model has painted."""
    colours = np.array(list(PALETTE.values()), dtype=np.float32)
    # |m - c|^2 without |m|^2, which is the same for all classes: a product instead of an array (..., classes, 3).
    distances = (colours**2).sum(axis=1) - 2 * mask.astype(np.float32) @ colours.T
    return distances.argmin(axis=-1)


def _outline(look: Features, grow: float = 0.0) -> Points:
    """The head, narrower towards the chin."""
    points = oval(0, 0, look.width + grow, 1 + grow)
    points[:, 0] *= 1 - look.chin * np.clip(points[:, 1], 0, None) ** 1.5
    return points


def _body(canvas: Canvas, rng: Generator, look: Features, wished: Colour | None) -> None:
    """Neck and shoulders, which belong to the background."""
    chosen = hsv(rng.random(), rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.95))
    shirt = wished or chosen
    shadow = shade(look.skin, 0.72)  # sets the neck off against the chin
    canvas.fill(oval(0, 3.3, 1.75, 2.05, 0.5, 1.0), shirt, BACKGROUND)
    canvas.fill(line((-0.36, 0.5), (0.36, 0.5), (0.42, 1.32), (0, 1.62), (-0.42, 1.32)), shadow, BACKGROUND)
    collar = shade(shirt, 0.75)
    for side in (-1, 1):
        canvas.stroke(line((side * 0.46, 1.29), (0, 1.66)), collar, 0.08)


def _head(canvas: Canvas, rng: Generator, look: Features) -> None:
    shadow = shade(look.skin, 0.86)
    for side in (-1, 1):
        canvas.fill(oval(side * look.width, 0.02, 0.14, 0.22), look.skin, FACE)
        canvas.fill(oval(side * (look.width + 0.02), 0.03, 0.07, 0.13), shadow)
    canvas.fill(_outline(look), shadow, FACE)
    canvas.fill(_outline(look, grow=-0.05) + np.array([-0.02, -0.03]), look.skin)
    if rng.random() < 0.5:
        blush = tuple(round(0.75 * own + 0.25 * red) for own, red in zip(look.skin, (230, 70, 80), strict=True))
        for side in (-1, 1):
            canvas.fill(oval(side * 0.6 * look.width, 0.28, 0.16, 0.11), (blush[0], blush[1], blush[2]))


def _eyes(canvas: Canvas, rng: Generator, look: Features) -> None:
    distance, height = rng.uniform(0.42, 0.48) * look.width, rng.uniform(-0.16, -0.04)
    radius_x, radius_y = rng.uniform(0.15, 0.19), rng.uniform(0.09, 0.15)
    iris = hsv(rng.choice([0.07, 0.09, 0.3, 0.56, 0.6]), rng.uniform(0.4, 0.8), rng.uniform(0.25, 0.75))
    gaze_x, gaze_y = rng.uniform(-0.05, 0.05), rng.uniform(-0.02, 0.02)
    tilt, arch = rng.uniform(-0.08, 0.08), rng.uniform(0.0, 0.08)
    brow_width, brow = rng.uniform(0.05, 0.1), shade(look.hair, 0.8)
    for side in (-1, 1):
        x = side * distance
        canvas.fill(oval(x, height, radius_x, radius_y), (250, 250, 248), EYES)
        radius = min(radius_y * 0.86, 0.1)
        canvas.fill(oval(x + gaze_x, height + gaze_y, radius, radius), iris)
        canvas.fill(oval(x + gaze_x, height + gaze_y, radius * 0.55, radius * 0.55), (16, 14, 20))
        canvas.fill(oval(x + gaze_x + 0.03, height + gaze_y - 0.03, 0.022, 0.022), (255, 255, 255))
        canvas.stroke(oval(x, height, radius_x, radius_y, 0.52, 0.98), (40, 26, 26), 0.035)
        level = height - radius_y - 0.14
        inner, outer = x - side * radius_x * 1.1, x + side * radius_x * 1.2
        canvas.stroke(
            line((inner, level + tilt), (x, level - arch), (outer, level - tilt + arch * 0.6)), brow, brow_width
        )


def _nose(canvas: Canvas, rng: Generator, look: Features) -> None:
    length, width = rng.uniform(0.22, 0.34), rng.uniform(0.08, 0.14)
    shadow, light = shade(look.skin, 0.74), shade(look.skin, 1.25)
    canvas.stroke(line((0.02, -0.02), (width * 0.6, length - 0.05)), shade(look.skin, 0.88), 0.05)
    canvas.stroke(oval(0, length - 0.02, width, 0.06, 0.04, 0.46), shadow, 0.045)
    canvas.fill(oval(-0.02, length - 0.07, 0.04, 0.05), light)


def _mouth(canvas: Canvas, rng: Generator, look: Features) -> None:
    y, width = rng.uniform(0.54, 0.62), rng.uniform(0.22, 0.34)
    lips = hsv(rng.uniform(-0.03, 0.02), rng.uniform(0.45, 0.75), rng.uniform(0.55, 0.85))
    kind = rng.choice(["smile", "laugh", "closed", "round"])
    if kind == "round":
        radius = width * 0.45
        canvas.fill(oval(0, y, radius, radius * 1.1), lips, MOUTH)
        canvas.fill(oval(0, y, radius * 0.6, radius * 0.7), (70, 16, 24))
    elif kind == "laugh":
        upper, lower = line((-width, y - 0.06), (width, y - 0.06)), oval(0, y - 0.06, width, 0.22, 0.5, 0.0)
        canvas.fill(between(upper, lower), lips, MOUTH)
        upper, lower = (
            line((-width * 0.82, y - 0.03), (width * 0.82, y - 0.03)),
            oval(0, y - 0.03, width * 0.82, 0.15, 0.5, 0.0),
        )
        canvas.fill(between(upper, lower), (90, 20, 30))
        teeth = line(
            (-width * 0.76, y - 0.03), (width * 0.76, y - 0.03), (width * 0.68, y + 0.03), (-width * 0.68, y + 0.03)
        )
        canvas.fill(teeth, (250, 248, 240))
    else:
        bend = rng.uniform(0.06, 0.14) if kind == "smile" else rng.uniform(-0.03, 0.02)
        across = np.linspace(-1, 1, 33)
        middle = y - bend * (across**2 - 0.5)
        full = rng.uniform(0.05, 0.09) * np.sqrt(1 - across**2) + 0.012
        upper = np.stack([across * width, middle - full * (1 - 0.25 * np.exp(-((across * 6) ** 2)))], axis=1)
        lower = np.stack([across * width, middle + full * 1.15], axis=1)
        canvas.fill(between(upper, lower), lips, MOUTH)
        canvas.stroke(np.stack([across * width * 0.92, middle], axis=1), shade(lips, 0.55), 0.03)


def _beard(canvas: Canvas, rng: Generator, look: Features) -> None:
    if look.style in ("bob", "long", "pigtails", "bun") or rng.random() < 0.6:
        return
    if rng.random() < 0.5:  # a full beard: the outline of the jaw, hollow above
        jaw = _outline(look, grow=0.07)
        jaw = jaw[jaw[:, 1] >= 0.05]
        jaw = jaw[np.argsort(jaw[:, 0])]
        across = np.linspace(-1, 1, 33)
        edge = np.stack([across * look.width * 0.93, 0.1 + 0.3 * np.sqrt(1 - across**4)], axis=1)
        canvas.fill(between(edge, jaw), look.hair, HAIR)
    for side in (-1, 1):
        canvas.fill(oval(side * 0.15, 0.44, 0.19, 0.07), look.hair, HAIR)


def _hair_behind(canvas: Canvas, look: Features) -> None:
    dark, width = shade(look.hair, 0.72), look.width
    if look.style == "long":
        canvas.fill(
            np.concatenate([oval(0, -0.15, width + 0.22, 1.05, 0.5, 1.0), oval(0, 1.5, width + 0.3, 0.3, 0.0, 0.5)]),
            dark,
            HAIR,
        )
    elif look.style == "bob":
        canvas.fill(
            np.concatenate([oval(0, -0.15, width + 0.2, 1.02, 0.5, 1.0), oval(0, 0.6, width + 0.22, 0.25, 0.0, 0.5)]),
            dark,
            HAIR,
        )
    elif look.style == "afro":
        for turn in np.linspace(0.46, 1.04, 11):
            x, y = np.cos(turn * 2 * np.pi) * (width + 0.1), np.sin(turn * 2 * np.pi) * 0.95 - 0.2
            canvas.fill(oval(float(x), float(y), 0.34, 0.34), dark, HAIR)
    elif look.style == "bun":
        canvas.fill(oval(0, -1.22, 0.3, 0.28), dark, HAIR)
    elif look.style == "pigtails":
        for side in (-1, 1):
            canvas.fill(oval(side * (width + 0.2), 0.42, 0.24, 0.46), dark, HAIR)
            canvas.fill(oval(side * (width + 0.17), 0.4, 0.17, 0.38), look.hair)
            canvas.fill(oval(side * (width + 0.1), 0.02, 0.1, 0.1), (200, 40, 60), HAIR)
    elif look.style == "spikes":
        turns = np.linspace(0.47, 1.03, 23) * 2 * np.pi
        reach = np.where(np.arange(23) % 2 == 0, 1.0, 1.3)
        canvas.fill(
            np.stack([np.cos(turns) * (width + 0.06) * reach, np.sin(turns) * 1.05 * reach - 0.05], axis=1), dark, HAIR
        )


def _hair_in_front(canvas: Canvas, rng: Generator, look: Features) -> None:
    """From the crown down to the hairline, with locks at the sides of longer hair."""
    if look.style == "bald":
        return
    across = np.linspace(-1, 1, 65)
    fringe = look.fringe + 0.12 * np.abs(across - look.parting) + 0.5 * np.abs(across) ** 6
    if rng.random() < 0.4:
        fringe += 0.05 * np.sin(across * rng.uniform(10, 18))
    crown = -(1.07 + 0.06 * rng.random()) * np.sqrt(1 - across**2)
    x = across * (look.width + 0.07)
    upper, lower = np.stack([x, np.minimum(crown, fringe)], axis=1), np.stack([x, fringe], axis=1)
    canvas.fill(between(upper, lower), look.hair, HAIR)
    light = shade(look.hair, 1.18)
    for depth, first, last in ((0.3, 12, 53), (0.55, 8, 30), (0.78, 8, 30)):
        strand = upper * (1 - depth) + lower * depth
        canvas.stroke(strand[first:last], light, 0.025)
    if look.style in ("long", "bob"):
        end = 1.55 if look.style == "long" else 0.72
        for side in (-1, 1):
            edge, inner = side * (look.width + 0.22), side * look.width * 0.9
            middle, half = (edge + inner) / 2, (edge - inner) / 2
            top = line((side * look.width * 0.93, -0.5), (edge, -0.4))
            canvas.fill(np.concatenate([top, oval(middle, end, half, 0.16, 0.0, 0.5)]), look.hair, HAIR)
            canvas.stroke(line((edge - side * 0.1, -0.3), (edge - side * 0.1, end - 0.05)), light, 0.025)


def _glasses(canvas: Canvas, rng: Generator, look: Features) -> None:
    """Frames in the picture alone: eyes and face behind them keep their labels."""
    colour = hsv(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.1, 0.5))
    radius, thickness, y, x = rng.uniform(0.25, 0.29), rng.uniform(0.035, 0.06), -0.1, 0.45 * look.width
    square = rng.random() < 0.4
    for side in (-1, 1):
        rim = oval(side * x, y, radius, radius * 0.9)
        if square:
            rim = oval(side * x, y, radius * 1.35, radius * 1.15, 0.125, 1.125)[[0, 12, 24, 36, 48, 1]]
        canvas.stroke(rim, colour, thickness)
        canvas.stroke(line((side * (x + radius), y - 0.05), (side * look.width * 1.02, y - 0.1)), colour, thickness)
    canvas.stroke(line((-(x - radius), y - 0.03), (0, y - 0.08), (x - radius, y - 0.03)), colour, thickness)


def _plain_glasses(canvas: Canvas, look: Features) -> None:
    """Round sunglasses, large enough to count in a small picture."""
    dark, y, x = (16, 16, 20), -0.1, 0.45 * look.width
    for side in (-1, 1):
        canvas.fill(oval(side * x, y, 0.32, 0.28), dark)
        canvas.stroke(line((side * (x + 0.3), y - 0.05), (side * look.width * 1.02, y - 0.1)), dark, 0.06)
    canvas.stroke(line((-x, y - 0.08), (x, y - 0.08)), dark, 0.08)


def _light(picture: Image.Image, rng: Generator) -> Image.Image:
    """A soft light from one side, so that a colour is not the same everywhere."""
    direction = rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[-1 : 1 : picture.height * 1j, -1 : 1 : picture.width * 1j]
    light = 0.98 + 0.1 * (math.cos(direction) * columns + math.sin(direction) * rows) - 0.05 * (rows**2 + columns**2)
    pixels = np.asarray(picture) * light[..., None]
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
