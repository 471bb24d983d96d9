"""What of a PNG makes its picture; texts, chunks of other programs and what stands behind its end are passed over."""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_SIDE_DATA = 1 << 22  # bytes of orientation or colour profile; printers' profiles have less than half
_END = b"\0\0\0\0IEND\xaeB`\x82"
_PICTURE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL")  # the last two tell an animation
_XMP = b"XML:com.adobe.xmp\0\0\0\0\0"  # keyword, not compressed, no language
_RAW = b"Raw profile type exif"


class Essence(NamedTuple):
    """A PNG of nothing but its picture, and what was beside that."""

    file: io.BytesIO
    info: dict[str, bytes | str]  # exif, xmp and icc_profile, as Pillow calls them, where they are there
    remarks: list[str]  # what was there and cannot be read


def essence(file: BinaryIO, pixels: bool) -> Essence:
    """Read a PNG up to its end chunk.

    Args:
        file: behind the signature.
        pixels: without, the picture's data is left out, and only its header can be read from the result.

    Raises:
        OSError: more data than a picture of its size can have.
    """
    kept, info, remarks = io.BytesIO(), dict[str, bytes | str](), list[str]()
    kept.write(SIGNATURE)
    room = LARGEST_SIDE_DATA  # for the data of the pixels, once the header has said how many there are
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            kept.write(_END)
            break
        if kind in _PICTURE and (pixels or kind != b"IDAT"):
            room -= length
            if room < 0:
                raise OSError("more data than a picture of its size can have")
            body = file.read(length)
            if kind == b"IHDR" and length >= 8:
                width, height = struct.unpack(">II", body[:8].ljust(8, b"\0"))
                room += 16 * width * height  # the deepest pixels have 8 bytes
            kept.write(head + body + file.read(4))
        elif kind in (b"eXIf", b"iCCP", b"iTXt", b"tEXt", b"zTXt") and length <= LARGEST_SIDE_DATA:
            _side_data(kind, file.read(length), info, remarks)
            file.seek(4, 1)
        else:
            file.seek(length + 4, 1)  # data and checksum
    if not pixels:
        kept.write(_END)
    kept.seek(0)
    return Essence(kept, info, remarks)


def _side_data(kind: bytes, body: bytes, info: dict[str, bytes | str], remarks: list[str]) -> None:
    """Take in an eXIf, which may come anywhere before the end (PNG third edition, 11.3.4.5), a profile, or the same as
    texts, as XMP and ImageMagick have them."""
    name, _, rest = body.partition(b"\0")
    if kind == b"eXIf":
        info["exif"] = body
    elif kind == b"iTXt" and body.startswith(_XMP):
        info["xmp"] = body.removeprefix(_XMP)
    elif kind == b"iCCP" or (kind == b"zTXt" and name == _RAW):
        unpack = zlib.decompressobj()
        try:
            unpacked = unpack.decompress(rest[1:], LARGEST_SIDE_DATA)
        except zlib.error:
            remarks.append(f"its {'colour profile' if kind == b'iCCP' else 'EXIF data'} cannot be unpacked")
            return
        if kind == b"iCCP":
            info["icc_profile"] = unpacked
        else:
            info[_RAW.decode()] = unpacked.decode("latin-1")
    elif kind == b"tEXt" and name == _RAW:
        info[_RAW.decode()] = rest.decode("latin-1")
