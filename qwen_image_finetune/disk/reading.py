"""Files that are read with a limit, and only where they are files: a pipe would wait for ever."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20
SMALL = 16 * MEBIBYTE  # more than any file of ours but metrics and logs


class Unreadable(ValueError):
    """A file that is not what stands in such files; says which, and what to do."""


def read_regular(path: Path, limit: int = SMALL) -> bytes:
    """The bytes of a file.

    Raises:
        Unreadable: it is a pipe, a device or a folder, or larger than `limit` bytes.
        OSError: it is missing or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise Unreadable(f"{path} is no regular file")
        if about.st_size > limit:
            raise Unreadable(f"{path} has {about.st_size:,} bytes, of which at most {limit:,} are read")
        return file.read(limit)


def read_json(path: Path, limit: int = SMALL) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        Unreadable: there is none; also where `read_regular` says so.
        OSError: it is missing or may not be read.
    """
    try:
        found = json.loads(read_regular(path, limit))
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path} is damaged, no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Unreadable(f"{path} is damaged: it holds a {type(found).__name__} where an object should be")
    return found
