"""The arguments of `qif lora`, tool by tool."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from qwen_image_finetune.command.options import of, overwritten, with_json
from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.config.values import Energy, Rank, Strength


def lora(verb: argparse.ArgumentParser) -> None:
    """What each tool takes."""
    tools = verb.add_subparsers(required=True, dest="tool", metavar="TOOL")
    words = {
        "show": "say what a file is: model, rank, norms of its blocks, metadata, which programs read it",
        "convert": "write it as another program wants it",
        "resize": "make it smaller: to a rank, or to a share of what it does",
        "add": "make one LoRA of several",
        "compare": "say how far two are apart, layer by layer",
        "extract": "make a LoRA of a full fine-tune, by what differs from its base",
        "merge": "put LoRAs into a base: a checkpoint for diffusers, or one file for ComfyUI",
    }
    for name, text in words.items():
        _TOOLS[name](tools.add_parser(name, help=text, description=text))


def _file(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("lora", type=Path, help="LoRA file, the checkpoint or version folder it is in, or OWNER/NAME")


def _family(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("--family", choices=sorted(FAMILIES), help="whose LoRA it is, where the file does not say so")


def _output(tool: argparse.ArgumentParser, default: str | None = "comfy") -> None:
    words = "key dialect; default: that of the file, or of the first" if default is None else "key dialect"
    tool.add_argument("--format", choices=("diffusers", "comfy", "kohya"), default=default, help=words)
    overwritten(tool)


def _smaller(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("--rank", type=of(Rank), help="of every layer, at most")
    tool.add_argument("--energy", type=of(Energy), help="share of the squares of singular values to keep, such as 0.95")


def _show(tool: argparse.ArgumentParser) -> None:
    _file(tool)
    _family(tool)
    with_json(tool)


def _convert(tool: argparse.ArgumentParser, default: str | None = "comfy") -> None:
    _file(tool)
    tool.add_argument("output", type=Path, help="file to write")
    _family(tool)
    _output(tool, default)


def _resize(tool: argparse.ArgumentParser) -> None:
    _convert(tool, None)
    _smaller(tool)


def _add(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("loras", type=Path, nargs="+", help="LoRA files, folders they are in, or OWNER/NAME")
    tool.add_argument("--output", type=Path, required=True, help="file to write")
    _strengths(tool)
    tool.add_argument("--rank", type=of(Rank), help="of every layer, at most; default: the sum of the ranks, exact")
    _family(tool)
    _output(tool, None)


def _compare(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("first", type=Path)
    tool.add_argument("second", type=Path)
    _family(tool)
    with_json(tool)


def _extract(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("tuned", type=Path, help="checkpoint or version folder of a full fine-tune, or one file")
    tool.add_argument("base", help="checkpoint that it began from: folder or hub id")
    tool.add_argument("output", type=Path, help="file to write")
    _smaller(tool)
    _output(tool)


def _merge(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("base", help="checkpoint to put it into: folder or hub id")
    tool.add_argument("loras", type=Path, nargs="+", help="LoRA files, folders they are in, or OWNER/NAME")
    tool.add_argument("--output", type=Path, required=True, help="folder to write, or with --single-file a file")
    _strengths(tool)
    tool.add_argument("--single-file", dest="single", action="store_true", help="as ComfyUI loads a diffusion model")
    tool.add_argument(
        "--precision", choices=("bf16", "fp32", "fp8"), default="bf16", help="fp8: with scales, for --single-file"
    )
    overwritten(tool)


def _strengths(tool: argparse.ArgumentParser) -> None:
    tool.add_argument(
        "--strength", dest="strengths", type=of(Strength), action="append", default=[], metavar="S",
        help="one for each file, in their order; default: 1",
    )  # fmt: skip


_TOOLS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "show": _show,
    "convert": _convert,
    "resize": _resize,
    "add": _add,
    "compare": _compare,
    "extract": _extract,
    "merge": _merge,
}
