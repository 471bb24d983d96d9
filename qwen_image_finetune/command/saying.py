"""What a verb says beside its result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image_finetune.machine import console

if TYPE_CHECKING:
    from qwen_image_finetune.config import Config


def read_config(file: Path, overrides: Sequence[str]) -> Config:
    """`load_config`, and what its reader should know.

    Raises:
        ConfigError: with all problems.
    """
    from qwen_image_finetune.config import load_config

    config = load_config(file, overrides)
    tell(config.notes)
    return config


def loading() -> None:
    """Say that packages load, which takes seconds in which nothing else is seen; once, and only if they do."""
    if "torch" not in sys.modules:
        console.note("loading torch and diffusers", sys.stderr)


def tell(notes: Sequence[str]) -> None:
    """What the reader of a configuration should know, beside what is printed: a dry run can be piped."""
    for note in notes:
        console.note(note, sys.stderr)
