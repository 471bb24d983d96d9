"""Editing instructions with a right answer: pairs (before, after) of drawn pictures, in any number, from a seed.

Segmentation is not among them: that is what the example LoRA teaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from qwen_image_finetune.toy.backgrounds import paint_background
from qwen_image_finetune.toy.canvas import Canvas, Colour, hsv, oval
from qwen_image_finetune.toy.faces import AS_DRAWN, Wish, draw_face

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "black": (12, 12, 12),
    "white": (246, 246, 246),
}
HELD_OUT_SEED = 1  # pictures of other seeds share none with it


class Pair(NamedTuple):
    """One example of an instruction."""

    before: Image.Image
    after: Image.Image
    prompt: str


@dataclass(frozen=True)
class Edit:
    """One instruction.

    Either `wish` changes what is drawn, or `change` computes the answer from the pixels before.
    """

    wordings: tuple[str, ...]  # {colour} is filled in
    share: float = 1.0  # of the pairs, relative to the others
    change: Callable[[Image.Image], Image.Image] | None = None
    start: Wish = AS_DRAWN
    wish: Callable[[Colour], Wish] = lambda colour: AS_DRAWN


def _outline(picture: Image.Image) -> Image.Image:
    """Dark lines on white where brightness changes between neighbours."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    down, right = np.diff(grey, axis=0, append=grey[-1:]), np.diff(grey, axis=1, append=grey[:, -1:])
    strength = np.clip(2.5 * np.hypot(down, right), 0, 255)
    return Image.fromarray((255 - strength).astype(np.uint8)).convert("RGB")


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(picture.width / 32))


def _posterise(picture: Image.Image) -> Image.Image:
    return ImageOps.posterize(picture, 2)


def _stamp(picture: Image.Image) -> Image.Image:
    """White where a pixel is brighter than the middle of the scale, else black."""
    return picture.convert("L").point(lambda level: 255 if level > 127 else 0).convert("RGB")


def _blocks(picture: Image.Image) -> Image.Image:
    """Squares of one colour, sixteen across."""
    small = picture.resize((16, 16), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def _brighter(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1.5)


def _darker(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(0.5)


EDITS: dict[str, Edit] = {
    "keep": Edit(("keep the picture as it is", "change nothing", "leave the photo as it is"), 0.5, change=lambda x: x),
    "mirror": Edit(("mirror the picture", "flip the photo left to right", "mirror it"), change=ImageOps.mirror),
    "grey": Edit(("make the picture grey", "remove all color", "turn the photo black and white"), 0.5, change=_grey),
    "invert": Edit(
        ("invert the colors", "make a negative of the photo", "invert the picture"), 0.5, change=ImageOps.invert
    ),
    "blur": Edit(("blur the picture", "make the photo blurry", "blur it"), 0.5, change=_blur),
    "outline": Edit(
        ("turn the photo into a pencil sketch", "draw the outline of the picture", "sketch the outline"),
        change=_outline,
    ),
    "posterise": Edit(
        ("reduce the picture to a few strong colors", "make a poster of the photo", "posterize it"),
        0.5,
        change=_posterise,
    ),
    "stamp": Edit(("make a stamp in black and white", "print it in black ink", "turn it into a stamp"), change=_stamp),
    "blocks": Edit(("show the picture in large pixels", "make it blocky", "pixelate the photo"), 0.5, change=_blocks),
    "upside down": Edit(
        ("turn the picture upside down", "flip the photo top to bottom", "turn it upside down"), change=ImageOps.flip
    ),
    "brighter": Edit(("make the picture brighter", "brighten the photo", "more light"), 0.5, change=_brighter),
    "darker": Edit(("make the picture darker", "darken the photo", "less light"), 0.5, change=_darker),
    "background": Edit(
        ("make the background {colour}", "change the background to {colour}", "put a {colour} wall behind the person"),
        3.0,
        wish=lambda colour: Wish(background=colour),
    ),
    "hair": Edit(
        ("make the hair {colour}", "color the hair {colour}", "give the person {colour} hair"),
        3.0,
        start=Wish(hat="none", hairy=True),
        wish=lambda colour: Wish(hat="none", hair=colour, hairy=True),
    ),
    "skin": Edit(
        ("paint the face {colour}", "make the skin {colour}", "give the person a {colour} face"),
        3.0,
        wish=lambda colour: Wish(skin=colour),
    ),
    "add glasses": Edit(
        ("add glasses to the person", "put glasses on the face", "add glasses"),
        start=Wish(glasses="none"),
        wish=lambda colour: Wish(glasses="plain"),
    ),
    "remove glasses": Edit(
        ("remove the glasses from the person", "take the glasses off", "remove the glasses"),
        start=Wish(glasses="plain"),
        wish=lambda colour: Wish(glasses="none"),
    ),
    "add hat": Edit(
        ("add a hat to the person", "put a red hat on the head", "add a hat"),
        2.0,
        start=Wish(hat="none"),
        wish=lambda colour: Wish(hat="plain"),
    ),
    "remove hat": Edit(
        ("remove the hat from the person", "take the hat off", "remove the hat"),
        2.0,
        start=Wish(hat="any"),
        wish=lambda colour: Wish(hat="none"),
    ),
    "hat": Edit(
        ("make the hat {colour}", "color the hat {colour}", "paint the hat {colour}"),
        3.0,
        start=Wish(hat="any"),
        wish=lambda colour: Wish(hat="any", hat_colour=colour),
    ),
    "shirt": Edit(
        ("make the shirt {colour}", "color the shirt {colour}", "paint the shirt {colour}"),
        2.0,
        wish=lambda colour: Wish(shirt=colour),
    ),
}


def all_prompts() -> list[str]:
    """Every sentence that a pair can come with."""
    sentences = [words for edit in EDITS.values() for words in edit.wordings]
    filled = [words.format(colour=colour) for words in sentences for colour in COLOURS]
    return list(dict.fromkeys(filled))


def draw_pair(name: str, seed: int, index: int, size: int) -> Pair:
    """The pair number `index` of an instruction; every seed and index draws another picture."""
    edit, rng = EDITS[name], np.random.default_rng([seed, list(EDITS).index(name), index])
    colour_name = list(COLOURS)[rng.integers(len(COLOURS))]
    prompt = edit.wordings[rng.integers(len(edit.wordings))].format(colour=colour_name)
    picture_seed = int(rng.integers(2**63))
    if edit.change is not None:
        before = draw_scene(rng, size) if rng.random() < 0.2 else _face(picture_seed, size, edit.start)
        return Pair(before, edit.change(before), prompt)
    after = _face(picture_seed, size, edit.wish(COLOURS[colour_name]))
    return Pair(_face(picture_seed, size, edit.start), after, prompt)


def draw_scene(rng: Generator, size: int) -> Image.Image:
    """A picture without a person."""
    canvas = Canvas(size, (0, 0, 0))
    paint_background(canvas, rng)
    return canvas.finish()[0]


def draw_poster(rng: Generator, size: int) -> Image.Image:
    """Flat shapes in strong colours, which faces and scenes lack: an autoencoder should know these too."""
    strong = [hsv(step / 12, rng.uniform(0.7, 1.0), rng.uniform(0.7, 1.0)) for step in range(12)]
    strong += [(0, 0, 0), (255, 255, 255)]
    canvas = Canvas(size, strong[rng.integers(len(strong))])
    for _ in range(rng.integers(3, 9)):
        centre_x, centre_y = rng.random(2)
        radius_x, radius_y = rng.uniform(0.02, 0.3, 2)
        start = rng.random()
        corners = 49 if rng.random() < 0.6 else int(rng.integers(3, 7))
        shape = oval(centre_x, centre_y, radius_x, radius_y, start, start + 1)
        canvas.fill(shape[:: max(1, 49 // corners)], strong[rng.integers(len(strong))])
    return canvas.finish()[0]


def shuffled_names(seed: int, count: int) -> list[str]:
    """Instructions of `count` pairs, drawn by their shares."""
    shares = np.array([edit.share for edit in EDITS.values()])
    chosen = np.random.default_rng(seed).choice(len(EDITS), size=count, p=shares / shares.sum())
    return [list(EDITS)[index] for index in chosen]


def _face(seed: int, size: int, wish: Wish) -> Image.Image:
    return draw_face(np.random.default_rng(seed), size, wish)[0]
