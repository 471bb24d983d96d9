"""The arguments of the command `qif`, verb by verb; `qwen_image_finetune.command.cli` does what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from qwen_image_finetune import __version__
from qwen_image_finetune.command.lora.arguments import lora
from qwen_image_finetune.command.options import of, overwritten, with_json
from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.config.values import (
    Count,
    NotNegative,
    Positive,
    Rank,
    Rate,
    Seed,
    Side,
    Strength,
)


def build_parser(verbs: Iterable[Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """The parser of the command; what it returns has the function of the verb as `run`.

    Args:
        verbs: functions by whose names verbs are called, and by whose docstrings they are explained.
    """
    parser = Parser("qif", description="Fine-tune image-editing models on pairs of pictures.")
    parser.add_argument("--version", action="version", version=__version__)
    choices = parser.add_subparsers(required=True, metavar="VERB")
    for run in verbs:
        verb = choices.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        verb.set_defaults(run=run)
        ARGUMENTS[run.__name__](verb)
    return parser


class Parser(argparse.ArgumentParser):
    """Refuses an option that is given twice, where one value counts: the first would be dropped without a word."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for name in (None, "store"):
            self.register("action", name, _Once)
        self.register("action", "extend", _Further)


class _Once(argparse.Action):
    """One value, from one place."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if option is not None and not _first(self, namespace):
            before = getattr(namespace, self.dest)
            parser.error(f"{option} is given twice, {_text(before)} and {_text(values)}: leave one of them out")
        setattr(namespace, self.dest, values)


class _Further(argparse.Action):
    """Values that join those given before, in place of the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = [] if _first(self, namespace) else getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*before, *cast("Sequence[Any]", values)])


def _first(action: argparse.Action, namespace: argparse.Namespace) -> bool:
    """Whether an option is met for the first time; the parsed options themselves remember it."""
    seen: set[str] = vars(namespace).setdefault("options_seen", set())
    first = action.dest not in seen
    seen.add(action.dest)
    return first


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


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
    verb.add_argument("--steps", type=of(Count), help="sampler steps; default: the model's own")
    verb.add_argument("--guidance", type=of(NotNegative), help="guidance scale; default: the model's own")


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
    verb.add_argument(
        "--lora", dest="loras", metavar="LORA", action="append", default=[],
        help="LoRA file, checkpoint or version folder, or hub id; given repeatedly, LoRAs together",
    )  # fmt: skip
    verb.add_argument(
        "--strength", dest="strengths", metavar="NUMBER", type=of(Strength), action="append", default=[],
        help="of the LoRA, 0 is the base; with several, one for each, in their order",
    )  # fmt: skip
    verb.add_argument(
        "--output", type=Path, default=Path("output.png"), help="file of the picture, or a folder for several"
    )
    verb.add_argument("--count", type=of(Count), default=1, help="pictures of each, with seeds from --seed on")
    verb.add_argument("--seed", type=of(Seed), default=0, help="of the noise")
    _sampler(verb)
    verb.add_argument("--negative-prompt", help="what classifier-free guidance steers away from")
    verb.add_argument("--image-guidance", type=of(NotNegative), default=1.0, help="guidance towards the references")
    verb.add_argument(
        "--width", type=of(Side), help="of the picture; default: that of the reference as the model sees it"
    )
    verb.add_argument("--height", type=of(Side), help="the same for its height")
    overwritten(verb)


def _check(verb: argparse.ArgumentParser) -> None:
    _configuration(verb)
    verb.add_argument(
        "--maps",
        metavar="FOLDER",
        type=Path,
        help="with loss.mask_loss=difference: draw source, target and map of each pair there",
    )
    with_json(verb)


def _evaluate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, help="the configuration, or the version folder of a run")
    verb.add_argument(
        "dataset", nargs="?", help="folder of pairs that were not trained on; default: those that the run held out"
    )
    _overrides(verb)
    verb.add_argument(
        "--lora", nargs="+", action="extend", default=[], help="LoRA files, checkpoint folders or hub ids"
    )
    verb.add_argument(
        "--checkpoints", nargs="+", action="extend", default=[], metavar="WHICH",
        help="of the run: all, best, latest, or steps; default: best, else latest",
    )  # fmt: skip
    verb.add_argument(
        "--strength", type=of(Strength), nargs="+", action="extend", default=[1.0], help="strengths of every LoRA"
    )
    verb.add_argument("--output", type=Path, help="folder; default: evaluation, in the run where one is given")
    verb.add_argument("--count", type=of(Count), help="pairs, spread over the folder; default: all")
    verb.add_argument("--seed", type=of(Seed), default=0, help="of the noise of the first pair; the next has the next")
    _sampler(verb)
    overwritten(verb)
    with_json(verb)


def _report(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("version", type=Path, help="version folder of a run")
    verb.add_argument("--output", type=Path, help="file; default: report.html in the run")
    overwritten(verb)


def _compare(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("versions", type=Path, nargs="+", help="version folders of runs, the first the one compared with")
    verb.add_argument("--output", type=Path, default=Path("compare.html"), help="file")
    overwritten(verb)


def _plan(verb: argparse.ArgumentParser) -> None:
    _configuration(verb)
    verb.add_argument("--card", help="its memory, such as 24GB, or its name, such as H100; default: this machine's")
    verb.add_argument("--references", type=of(Count), help="of each pair; default: one where the model takes any")
    with_json(verb, "as one line of JSON: sizes in GiB, times in seconds")


def _bench(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "family", help=f"whose architecture: {', '.join(sorted(FAMILIES))}; with --quick the configuration of a run"
    )
    verb.add_argument(
        "--quick", action="store_true",
        help="of a configuration: measure two or three precisions with its sizes, in about two minutes, and keep the "
        "answer for model.quantize=auto and train.compile=auto",
    )  # fmt: skip
    verb.set_defaults(overrides=[])  # of the configuration
    verb.add_argument(
        "variants", nargs="*", help="rows beside the baseline; default: all that can run here; with --quick overrides"
    )
    verb.add_argument("--size", type=of(Side), nargs=2, default=(1024, 1024), help="width and height in pixels")
    verb.add_argument("--batch", type=of(Count), default=1, help="samples a step")
    verb.add_argument("--rank", type=of(Rank), default=16, help="of the adapter")
    verb.add_argument("--steps", type=of(Count), default=5, help="timed steps of each row")
    verb.add_argument("--rounds", type=of(Count), default=2, help="over all rows, each built anew in each")
    verb.add_argument(
        "--card", dest="cards", action="append", default=[], metavar="24GB",
        help="a row with the settings that make the run fit such a card, and no more memory than it has; repeatable",
    )  # fmt: skip
    verb.add_argument("--peak-tflops", type=of(Positive), help="of the card's matrix products, for the utilisation")
    verb.add_argument("--output", type=Path, help="JSON file to write")
    verb.add_argument(
        "--text-tokens", type=of(Count), metavar="N", help="of the prompt; default: what the family has of them"
    )
    verb.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs, on a CPU say")
    overwritten(verb)


def _export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("lora", type=Path, help="LoRA file, or the checkpoint or version folder it is in")
    verb.add_argument("output", type=Path, help="file to write")
    verb.add_argument("--format", choices=("diffusers", "comfy", "kohya"), default="comfy", help="key dialect")
    verb.add_argument("--family", choices=sorted(FAMILIES), required=True, help="whose LoRA it is")
    overwritten(verb)


def _average(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "checkpoints", type=Path, nargs="+", help="checkpoint folders, oldest first, or the version folder of a run"
    )
    verb.add_argument("--output", type=Path, required=True, help="folder to write")
    verb.add_argument("--last", type=of(Count), help="so many of them; default: all")
    words = "what a checkpoint weighs against the next one, 0 to 1; default: 1, all alike"
    verb.add_argument("--decay", type=of(Rate), default=1.0, help=words)
    overwritten(verb)


def _studio(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", type=Path, nargs="?", default=Path(), help="pictures and runs; default: this folder")
    verb.add_argument("--port", type=int, default=8642, help="of the page; default: 8642")
    verb.add_argument(
        "--host", help="an address of this machine, for other machines to open the page too, with the link it prints"
    )


def _init(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", type=Path, nargs="?", help="of pairs: control_images/ and training_images/")
    verb.add_argument("--model", help="its name, such as FLUX.1-Kontext-dev, a hub id or a folder")
    verb.add_argument("--card", help="its memory, such as 24GB, its name, or 'this one', which is the default")
    verb.add_argument("--prefer", choices=("quality", "speed", "memory"), help="what matters more; default: quality")
    verb.add_argument("--output", type=Path, default=Path("my_run.yaml"), help="file; default: my_run.yaml")
    overwritten(verb)


def _convert(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "file", type=Path, help="of ai-toolkit (YAML), musubi-tuner (TOML, or a script with its command), SimpleTuner "
        "(config.json), OneTrainer (JSON) or qflux (YAML)",
    )  # fmt: skip
    verb.add_argument("--output", type=Path, default=Path("my_run.yaml"), help="file; default: my_run.yaml")
    verb.add_argument("--pairs", type=Path, help="folder that pairs are laid out in; default: OUTPUT_pairs")
    verb.add_argument("--model", help="hub id or folder, in place of the model that the file names")
    overwritten(verb)
    with_json(verb)


def _doctor(verb: argparse.ArgumentParser) -> None:
    with_json(verb)


def _demo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "folder", type=Path, nargs="?", default=Path("qif_demo"), help="where it works; default: ./qif_demo"
    )
    verb.add_argument("--files-only", action="store_true", help="put models, pairs and configurations there, and stop")


def _push(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("version", type=Path, help="version folder of a run")
    verb.add_argument("repository", help="OWNER/NAME on the hub; it is made if it is not there")
    words = "best, latest or a step; default: best, else latest"
    verb.add_argument("--checkpoint", default="best", metavar="WHICH", help=words)
    verb.add_argument("--no-pictures", dest="pictures", action="store_false", help="send no held-out pairs")
    verb.add_argument("--public", action="store_true", help="for everybody to see; default: private")
    verb.add_argument("--yes", action="store_true", help="send without asking")
    verb.add_argument("--dry-run", action="store_true", help="show what would be sent, and stop")


def _completion(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash and zsh: eval \"$(qif completion bash)\" in "
                      ".bashrc or .zshrc; fish: qif completion fish > ~/.config/fish/completions/qif.fish")  # fmt: skip


def _tiny(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("family", choices=sorted(FAMILIES), help="whose architecture")
    verb.add_argument("folder", type=Path, help="where to write it")


ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": _train,
    "cache": _configuration,
    "check": _check,
    "predict": _predict,
    "evaluate": _evaluate,
    "report": _report,
    "compare": _compare,
    "plan": _plan,
    "bench": _bench,
    "export": _export,
    "lora": lora,
    "average": _average,
    "studio": _studio,
    "doctor": _doctor,
    "init": _init,
    "convert": _convert,
    "push": _push,
    "demo": _demo,
    "completion": _completion,
    "tiny": _tiny,
}
