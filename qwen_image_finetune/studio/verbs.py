"""Verbs that a page waits for: short ones, one at a time."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence

from qwen_image_finetune.studio.jobs import without_secrets
from qwen_image_finetune.studio.keeper import cli
from qwen_image_finetune.studio.shelf import Refused, Shelf

LONGEST = 180.0  # seconds
_turns = threading.Semaphore(1)  # each loads torch: more of them at once take longer than one after the other


def run(shelf: Shelf, verb: str, arguments: Sequence[str]) -> str:
    """What a verb prints.

    Raises:
        Refused: it refuses or fails; in its words.
    """
    with _turns:
        try:
            done = subprocess.run(
                [*cli(), verb, *arguments],
                cwd=shelf.root,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST,
                check=False,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        except subprocess.TimeoutExpired:
            raise Refused(f"{verb} took longer than {LONGEST:.0f} seconds and was ended", 504) from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        start = next((place for place, line in enumerate(said) if line.startswith("error: ")), max(len(said) - 3, 0))
        raise Refused(without_secrets("\n".join(said[start:]).removeprefix("error: ")) or f"{verb} failed")
    return done.stdout
