"""Options that several verbs have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.config.ranges import checked


def of(kind: Any) -> Callable[[str], Any]:
    """Reads an option as a key of that type is read, with the same range."""

    def read(text: str) -> Any:
        try:
            return checked(kind, text, "")
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def overwritten(verb: argparse.ArgumentParser) -> None:
    """--overwrite."""
    verb.add_argument(
        "--overwrite", action="store_true", help="replace an output that is there; never a run's own file"
    )


def with_json(
    verb: argparse.ArgumentParser, words: str = "as one line of JSON on standard output, words on the other"
) -> None:
    """--json."""
    verb.add_argument("--json", action="store_true", help=words)
