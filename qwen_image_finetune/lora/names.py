"""What a model's authors call its modules, where LoRA files of other programs do not use diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Native:
    """A module under its authors' name: the diffusers modules in it, from the first output row to the last."""

    modules: tuple[str, ...]
    rows: tuple[int, ...] = (1,)  # output rows of each module, in shares of each other
    halves_swapped: bool = False  # (shift, scale) where diffusers has (scale, shift)


USUAL_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of attention, as most models call them

Names = Mapping[str, Native]  # by the authors' names; {} stands for the number of a block


@dataclass(frozen=True)
class Naming:
    """What has to be known of a model to read and write its LoRA files."""

    pipeline: type[Any]  # diffusers' class, whose own conversion knows further dialects
    native: Names
