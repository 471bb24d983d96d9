"""Which function each tool of `qif lora` is."""

from __future__ import annotations

import argparse
from typing import Any

from qwen_image_finetune.command.lora import show as showing
from qwen_image_finetune.command.lora.extract import extract
from qwen_image_finetune.command.lora.files import family_of
from qwen_image_finetune.command.lora.merge import merge
from qwen_image_finetune.command.lora.reshape import add, resize
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora.export import export
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.lora.sources import find_lora
from qwen_image_finetune.machine import console


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Do what a tool is asked for and say what there is to know of the result; returns it where there are values."""
    tool = options.tool
    if tool in ("show", "compare"):
        if tool == "show":
            found = showing.show(options.lora, options.family)
            lines = showing.show_words(found)
        else:
            found = showing.compare(options.first, options.second, options.family)
            lines = showing.compare_words(found)
        for line in lines:
            print(line)
        return found
    for line in _made(options):
        console.say(line)
    print(options.output)
    return None


def _made(options: argparse.Namespace) -> list[str]:
    given = options
    if given.tool == "convert":
        naming = get_family(family_of(find_lora(given.lora), given.family)).naming
        return export(given.lora, given.output, given.format, naming, given.overwrite)
    if given.tool == "resize":
        return resize(
            given.lora, given.output, given.rank, given.energy, given.format, given.family, given.overwrite
        )  # fmt: skip
    if given.tool == "add":
        return add(
            given.loras, given.strengths, given.output, given.rank, given.format, given.family, given.overwrite
        )  # fmt: skip
    if given.tool == "extract":
        return extract(
            given.tuned, given.base, given.output, given.rank, given.energy, given.format, given.overwrite
        )  # fmt: skip
    if given.strengths and len(given.strengths) != len(given.loras):
        raise LoraFileError(f"{len(given.loras)} files and {len(given.strengths)} strengths: give one for each")
    loras = zip(given.loras, given.strengths or [1.0] * len(given.loras), strict=True)
    return merge(loras, given.base, given.output, given.single, given.precision, given.overwrite)
