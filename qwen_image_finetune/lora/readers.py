"""Which programs read a LoRA file, and what they leave of it: said at every export, held by tests/lora/test_readers.py.

A program that leaves a part gives another picture, mostly without a word of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EVERYTHING = ".*"
OUTSIDE_BLOCKS = r"(?!(\w+_)?blocks\.).*"
# Adapters other than a LoRA that a program reads in a dialect as they are meant.
MORE_KINDS = {
    ("diffusers", "diffusers"): ("DoRA", "LoKr"),
    **{("ComfyUI", dialect): ("DoRA", "LoKr", "LoHa") for dialect in ("diffusers", "comfy", "kohya")},
}


@dataclass(frozen=True)
class Reader:
    """A program, and one dialect that it reads."""

    program: str
    dialect: str
    leaves: str | None = None  # of the modules, by their names in the file: an expression that matches whole names
    how: str = ""  # it is read, where that is not at once

    def words(self, modules: Sequence[str], kind: str = "LoRA") -> str:
        """What the program makes of a file with these modules, an adapter of a kind."""
        if kind not in MORE_KINDS.get((self.program, self.dialect), ()) and kind != "LoRA":
            return f"{self.program} reads no {kind} of this format: another picture, or an error"
        left = [name for name in modules if self.leaves is not None and re.fullmatch(self.leaves, name)]
        if len(left) == len(modules):
            return f"{self.program} reads nothing of it"
        if not left:
            return f"{self.program} reads all of it{self.how}"
        shown = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
        return f"{self.program} reads it{self.how}, but leaves {len(left)} of its {len(modules)} layers: {shown}"


CONVERTED = ", after its convert_lora.py"

# For models whose modules other programs call as diffusers does.
USUAL_READERS = (
    *(Reader("ComfyUI", dialect) for dialect in ("diffusers", "comfy", "kohya")),
    *(Reader("diffusers", dialect) for dialect in ("diffusers", "comfy", "kohya")),
    *(Reader("musubi-tuner", dialect, OUTSIDE_BLOCKS, CONVERTED) for dialect in ("diffusers", "comfy")),
    Reader("musubi-tuner", "kohya", OUTSIDE_BLOCKS),
)


def readers_words(readers: Iterable[Reader], dialect: str, modules: Sequence[str], kind: str = "LoRA") -> list[str]:
    """A line for each program that reads a dialect, about a file with these modules, an adapter of a kind."""
    return [reader.words(modules, kind) for reader in readers if reader.dialect == dialect]
