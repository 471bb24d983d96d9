"""TensorBoard's event files, read without TensorBoard: how far a run came that left nothing else."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path


def event_steps(path: Path) -> Iterator[int]:
    """The steps in an event file.

    A file is a row of records: length (8 bytes), its checksum (4), an Event message, its checksum (4). An Event
    begins with the wall time (tag 0x09, 8 bytes) and, unless it is 0, the step (tag 0x10, varint).
    """
    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12:
            start = file.read(20)
            if start[:1] == b"\x09" and start[9:10] == b"\x10":
                yield _varint(start[10:])
            file.seek(struct.unpack("<Q", head[:8])[0] + 4 - len(start), os.SEEK_CUR)


def _varint(data: bytes) -> int:
    """The number that `data` begins with, seven bits a byte, lowest first; the top bit says that more follow."""
    value = 0
    for index, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            break
    return value
