"""Files that are found under the name of a picture and are something else, told by how they begin."""

from __future__ import annotations

import re

_KINDS = {
    "a HEIC picture": re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL),
    "an AVIF picture": re.compile(rb"....ftypavi", re.DOTALL),
    "a JPEG XL picture": re.compile(rb"\xff\x0a|....JXL ", re.DOTALL),
    "a JPEG 2000 picture": re.compile(rb"....jP  |\xff\x4f\xff\x51", re.DOTALL),
    "a TIFF picture (or a camera's raw file)": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "a Photoshop file": re.compile(rb"8BPS"),
    "an SVG drawing": re.compile(rb"\s*(<\?xml[^>]*>\s*)?<svg"),
    "a web page": re.compile(rb"\s*<(!doctype\s+)?html", re.IGNORECASE),
    "a pointer of Git LFS (git lfs pull fetches the file)": re.compile(rb"version https://git-lfs"),
    "a PDF": re.compile(rb"%PDF"),
    "an archive": re.compile(rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b"),
}


def kind_of(beginning: bytes) -> str | None:
    """What a file is, in words, from its first 64 bytes; None where that cannot be told."""
    return next((name for name, sign in _KINDS.items() if sign.match(beginning)), None)
