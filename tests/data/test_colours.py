"""A picture under a colour profile becomes the colours that a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from qwen_image_finetune.data.images import open_upright, upright

# Adobe RGB (1998) and sRGB, adapted to D50: columns are the primaries.
WIDE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 563 / 256


def profile(space: bytes = b"RGB ") -> bytes:
    """A matrix profile with the primaries of Adobe RGB, or a grey one, of the same gamma."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563)
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 78}
    tags |= {b"cprt": b"text\0\0\0\0none\0", b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642) + fixed(1) + fixed(0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for name, primary in zip((b"r", b"g", b"b"), WIDE.T, strict=True):
            tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + b"".join(map(fixed, primary)), name + b"TRC": curve}
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        padded = tag + b"\0" * (-len(tag) % 4)
        table += name + struct.pack(">II", at + len(body), len(padded))
        body += padded
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    return head + fixed(0.9642) + fixed(1) + fixed(0.8249) + b"\0" * 48 + table + body


def as_shown(values: NDArray[np.uint8], wide: bool = True) -> NDArray[np.float64]:
    """sRGB of numbers (..., 3), by the definition of the profile and of sRGB (IEC 61966-2-1)."""
    linear = (values / 255) ** GAMMA
    if wide:
        linear = (linear @ WIDE.T @ np.linalg.inv(SRGB).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(20, 236, shape, dtype=np.uint8)


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_colours_are_those_of_a_viewer(tmp_path: Path, ending: str) -> None:
    values = pixels(4, 4, 3).repeat(8, axis=0).repeat(8, axis=1)
    options = {"lossless": True} if ending == "webp" else {"quality": 100, "subsampling": 0} if ending == "jpg" else {}
    Image.fromarray(values).save(tmp_path / f"a.{ending}", icc_profile=profile(), **options)
    with Image.open(tmp_path / f"a.{ending}") as file:
        expected = as_shown(np.asarray(file))
        opened = upright(file)
    read = open_upright(tmp_path / f"a.{ending}")
    assert np.abs(np.asarray(read) - expected).max() < 2
    assert np.abs(expected - values).max() > 30  # what is left out, left out
    assert np.array_equal(read, opened)
    assert np.array_equal(upright(read), read)  # once, not twice


def test_grey_and_transparent_pictures_too(tmp_path: Path) -> None:
    grey, rgba = pixels(16, 16), pixels(16, 16, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png", icc_profile=profile(b"GRAY"))
    expected = as_shown(grey, wide=False)
    assert np.abs(np.asarray(open_upright(tmp_path / "grey.png"))[..., 1] - expected).max() < 2
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png", icc_profile=profile(b"GRAY"))
    assert np.abs(np.asarray(open_upright(tmp_path / "deep.png"))[..., 1] - expected).max() < 2
    Image.fromarray(rgba).save(tmp_path / "rgba.png", icc_profile=profile())
    share = rgba[..., 3:] / 255
    shown = as_shown(rgba[..., :3]) * share + 255 * (1 - share)
    assert np.abs(np.asarray(open_upright(tmp_path / "rgba.png")) - shown).max() < 3


def test_inks_are_converted_by_their_profile(tmp_path: Path) -> None:
    """No profile of a press is at hand; one of the wrong kind is said, and the inks are read as without any."""
    Image.new("CMYK", (8, 8), (51, 102, 153, 51)).save(tmp_path / "a.jpg", icc_profile=profile(), quality=100)
    Image.new("CMYK", (8, 8), (51, 102, 153, 51)).save(tmp_path / "b.jpg", quality=100)
    remarks: list[str] = []
    assert np.array_equal(open_upright(tmp_path / "a.jpg", remarks=remarks), open_upright(tmp_path / "b.jpg"))
    assert remarks == [
        "its colour profile cannot be applied, so its numbers are taken as sRGB (it is for RGB, the picture is CMYK)"
    ]


def test_srgb_is_left_as_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=own)
    assert np.array_equal(open_upright(tmp_path / "a.png"), values)


def test_values_of_a_mask_are_no_colours(tmp_path: Path) -> None:
    values = pixels(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=profile(b"GRAY"))
    assert np.array_equal(np.asarray(open_upright(tmp_path / "a.png", mask=True))[..., 0], values)


def test_a_profile_that_cannot_be_read_is_said_and_passed_over(tmp_path: Path) -> None:
    values = pixels(16, 16, 3)
    Image.fromarray(values).save(tmp_path / "cut.png", icc_profile=profile()[:200])
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=b"no profile")
    Image.fromarray(values).save(tmp_path / "packed.png")
    content = (tmp_path / "packed.png").read_bytes()
    at, body = content.index(b"IDAT") - 4, b"name\0\0not packed"
    bad = struct.pack(">I", len(body)) + b"iCCP" + body + struct.pack(">I", zlib.crc32(b"iCCP" + body))
    (tmp_path / "packed.png").write_bytes(content[:at] + bad + content[at:])
    for name in ("cut.png", "a.png", "packed.png"):
        remarks: list[str] = []
        assert np.array_equal(open_upright(tmp_path / name, remarks=remarks), values)
        assert len(remarks) == 1 and "colour profile" in remarks[0]


def test_littlecms_reads_the_profile_of_these_tests() -> None:
    for space in (b"RGB ", b"GRAY"):
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile(space)))
        assert opened.profile.xcolor_space == space.decode()
