"""The arguments of the command `qif`, verb by verb; `qwen_image_finetune.command.cli` does what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from qwen_image_finetune import __version__
from qwen_image_finetune.config.registry import FAMILIES


def build_parser(verbs: Iterable[Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of the command; what it returns has the function of the verb as `run`.

    Args:
        verbs: functions by whose names verbs are called, and by whose docstrings they are explained.
    """
    parser = argparse.ArgumentParser("qif", description="Fine-tune image-editing models on pairs of pictures.")
    parser.add_argument("--version", action="version", version=__version__)
    choices = parser.add_subparsers(required=True, metavar="VERB")
    for run in verbs:
        verb = choices.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        verb.set_defaults(run=run)
        ARGUMENTS[run.__name__](verb)
    return parser


class _Misplaced(argparse.Action):
    """--config FILE, as other programs have it."""

    def __call__(self, parser: argparse.ArgumentParser, *parsed: object, **named: object) -> NoReturn:
        parser.error(f"the configuration stands without --config: {parser.prog} {parsed[1]}")


def _configuration(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, help="the configuration, a YAML file")
    verb.add_argument(
        "--config", dest="misplaced", action=_Misplaced, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    _overrides(verb)


def _overrides(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="instead of what the file says")


def _sampler(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--steps", type=int, help="sampler steps; default: the model's own")
    verb.add_argument("--guidance", type=float, help="guidance scale; default: the model's own")


def _train(verb: argparse.ArgumentParser) -> None:
    _configuration(verb)
    verb.add_argument("--dry-run", action="store_true", help="say what would be loaded, trained and written")


def _predict(verb: argparse.ArgumentParser) -> None:
    _configuration(verb)
    verb.add_argument("--prompt", required=True, help="the instruction")
    source = verb.add_argument_group("what is edited")
    source.add_argument(
        "--image", dest="images", metavar="PICTURE", type=Path, action="append", default=[],
        help="reference; given repeatedly, the references of one picture",
    )  # fmt: skip
    source.add_argument("--folder", type=Path, help="instead: edit each picture of this folder on its own")
    verb.add_argument("--lora", help="LoRA file, checkpoint or version folder, or hub id")
    verb.add_argument("--strength", type=float, default=1.0, help="of the LoRA; 0 is the base")
    verb.add_argument(
        "--output", type=Path, default=Path("output.png"), help="file of the picture, or a folder for several"
    )
    verb.add_argument("--count", type=int, default=1, help="pictures of each, with seeds from --seed on")
    verb.add_argument("--seed", type=int, default=0, help="of the noise")
    _sampler(verb)
    verb.add_argument("--negative-prompt", help="what classifier-free guidance steers away from")
    verb.add_argument("--image-guidance", type=float, default=1.0, help="guidance towards the references")
    verb.add_argument("--width", type=int, help="of the picture; default: that of the reference as the model sees it")
    verb.add_argument("--height", type=int, help="the same for its height")


def _evaluate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, help="the configuration, or the version folder of a run")
    verb.add_argument("dataset", type=Path, help="folder of pairs that were not trained on")
    _overrides(verb)
    verb.add_argument("--lora", nargs="+", default=[], help="LoRA files, checkpoint folders or hub ids")
    verb.add_argument(
        "--checkpoints", nargs="+", default=[], metavar="WHICH",
        help="of the run: all, best, latest, or steps; default: best, else latest",
    )  # fmt: skip
    verb.add_argument("--strength", type=float, nargs="+", default=[1.0], help="strengths of every LoRA")
    verb.add_argument("--output", type=Path, help="folder; default: evaluation, in the run where one is given")
    verb.add_argument("--count", type=int, help="pairs, spread over the folder; default: all")
    verb.add_argument("--seed", type=int, default=0, help="of the noise of the first pair; the next has the next")
    _sampler(verb)


def _report(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("version", type=Path, help="version folder of a run")
    verb.add_argument("--output", type=Path, help="file; default: report.html in the run")


def _compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("versions", type=Path, nargs="+", help="version folders of runs, the first the one compared with")
    verb.add_argument("--output", type=Path, default=Path("compare.html"), help="file")


def _plan(verb: argparse.ArgumentParser) -> None:
    _configuration(verb)
    verb.add_argument("--card", help="its memory, such as 24GB, or its name, such as H100; default: this machine's")


def _bench(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("family", choices=sorted(FAMILIES), help="whose architecture")
    verb.add_argument("variants", nargs="*", help="rows beside the baseline; default: all that can run here")
    verb.add_argument("--size", type=int, nargs=2, default=(1024, 1024), help="width and height in pixels")
    verb.add_argument("--batch", type=int, default=1, help="samples a step")
    verb.add_argument("--rank", type=int, default=16, help="of the adapter")
    verb.add_argument("--steps", type=int, default=5, help="timed steps of each row")
    verb.add_argument("--rounds", type=int, default=2, help="over all rows, each built anew in each")
    verb.add_argument(
        "--card", dest="cards", action="append", default=[], metavar="24GB",
        help="a row with the settings that make the run fit such a card, and no more memory than it has; repeatable",
    )  # fmt: skip
    verb.add_argument("--peak-tflops", type=float, help="of the card's matrix products, for the utilisation")
    verb.add_argument("--output", type=Path, help="JSON file to write")
    verb.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs, on a CPU say")


def _export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("lora", type=Path, help="LoRA file, or the checkpoint or version folder it is in")
    verb.add_argument("output", type=Path, help="file to write")
    verb.add_argument("--format", choices=("diffusers", "comfy", "kohya"), default="comfy", help="key dialect")
    verb.add_argument("--family", choices=sorted(FAMILIES), required=True, help="whose LoRA it is")


def _tiny(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("family", choices=sorted(FAMILIES), help="whose architecture")
    verb.add_argument("folder", type=Path, help="where to write it")


ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": _train,
    "cache": _configuration,
    "check": _configuration,
    "predict": _predict,
    "evaluate": _evaluate,
    "report": _report,
    "compare": _compare,
    "plan": _plan,
    "bench": _bench,
    "export": _export,
    "tiny": _tiny,
}
