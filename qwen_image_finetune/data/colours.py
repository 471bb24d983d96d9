"""Colours as a viewer shows them: the numbers of a picture under its embedded profile become sRGB, by LittleCMS."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, features

# A profile that changes no colour by more than this, of 255, is sRGB in another spelling: nothing is converted.
_ROUNDING = 2
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> mode of its numbers


class ProfileError(ValueError):
    """A colour profile that cannot be applied, and why."""


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, bool]:
    """A picture (L, RGB or CMYK) whose numbers mean what `profile` says, as sRGB; and whether that changed them.

    Relative colorimetric with the black points on each other, as image editors convert by default.

    Raises:
        ProfileError: the profile is damaged, or belongs to numbers of another kind.
    """
    mode, transform = _transform(profile)
    if (mode == "CMYK") != (image.mode == "CMYK"):
        raise ProfileError(f"it is for {mode}, the picture is {image.mode}")
    if transform is None:
        return image.convert("RGB"), False
    return transform.apply(image if image.mode == mode else image.convert(mode)), True


@lru_cache(maxsize=8)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Mode of the numbers, and their way to sRGB; None where they are sRGB."""
    if not features.check("littlecms2"):
        raise ProfileError("this Pillow was built without LittleCMS")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space.strip())
        if mode is None:
            raise ProfileError(f"it is for {source.profile.xcolor_space.strip()} colours")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError) as error:
        raise ProfileError(f"LittleCMS says: {error}") from error
    return mode, None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Tried on colours all over the cube, or on every grey."""
    steps = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps), -1, 3)
    probe = Image.fromarray(cube if mode == "RGB" else steps[None])
    before, after = (np.asarray(each.convert("RGB"), dtype=np.int16) for each in (probe, transform.apply(probe)))
    return int(np.abs(before - after).max()) <= _ROUNDING
