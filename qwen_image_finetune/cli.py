"""The command `qif`: one verb for each thing a person does. Heavy packages are imported by the verb that needs them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_finetune import __version__

if TYPE_CHECKING:
    from qwen_image_finetune.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 refused, 130/143 stopped by a signal."""
    options = parse(_parser(), arguments)
    return guarded(options.run, options)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse with overrides anywhere among the options: argparse alone takes only those beside the configuration."""
    options, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if "overrides" in options and "=" in word and not word.startswith("-")]
    strange = [word for word in rest if word not in overrides]
    if strange:
        hint = "; a run goes on with train.resume_from_checkpoint=latest" if "--resume" in strange else ""
        parser.error(f"unrecognized arguments: {' '.join(strange)}{hint}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def guarded(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Call a verb. What a person can mend is an exception of ours, and comes out as one message, no traceback."""
    try:
        run(options)
    except (ValueError, RuntimeError, OSError) as error:
        if not type(error).__module__.startswith("qwen_image_finetune"):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # several processes refuse the same: the launcher ends the others once the first has said it
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


# The verbs


def train(options: argparse.Namespace) -> None:
    """Train as the configuration says."""
    run_training(options.config, options.overrides, dry_run=options.dry_run)


def cache(options: argparse.Namespace) -> None:
    """Compute the embeddings of the data set and keep them."""
    run_training(options.config, options.overrides, only_cache=True)


def run_training(config_file: Path, overrides: Sequence[str], dry_run: bool = False, only_cache: bool = False) -> None:
    """What `qif train`, `qif cache` and `python -m src.main` share."""
    from qwen_image_finetune.signals import StopSignals

    with StopSignals():  # from the first moment: packages alone take seconds to load
        from qwen_image_finetune.config import load_config

        config = load_config(config_file, overrides)
        tell(config.notes)
        if dry_run:
            from qwen_image_finetune.check import check_run
            from qwen_image_finetune.dry_run import describe

            print(describe(config))
            check_run(config)
            return
        check_folders(config, only_cache)
        if only_cache:
            from qwen_image_finetune.embeddings import encode_dataset

            encode_dataset(config)
        else:
            from qwen_image_finetune.train import train

            train(config)


def check_folders(config: Config, only_cache: bool) -> None:
    """Refuse folders that cannot be written within a moment, before a heavy package is imported."""
    from qwen_image_finetune.files import check_writable

    if not only_cache:
        check_writable(config.logging.project_dir, "logging.output_dir")
    if only_cache or config.cache.use_cache:
        check_writable(Path(config.cache.cache_dir).expanduser(), "cache.cache_dir")


def predict(options: argparse.Namespace) -> None:
    """Draw pictures: one from its references, or one for each picture of a folder."""
    from qwen_image_finetune.config import load_config
    from qwen_image_finetune.draw import Request, draw

    config = load_config(options.config, options.overrides)
    given = {field.name: getattr(options, field.name) for field in fields(Request)}
    draw(config, Request(**{**given, "images": tuple(options.images)}))


def check(options: argparse.Namespace) -> None:
    """Check configuration and data, decoding every picture, and load nothing else."""
    from qwen_image_finetune.check import refusal, run_problems
    from qwen_image_finetune.config import load_config, resolve_family
    from qwen_image_finetune.data.images import DataError
    from qwen_image_finetune.families import get_family
    from qwen_image_finetune.held_out import open_pairs

    config = load_config(options.config, options.overrides)
    tell(config.notes)
    problems = run_problems(config)
    try:
        pairs = open_pairs(config, get_family(resolve_family(config)[0]), decode=True)
    except DataError as error:
        more = [line for line in error.problems if not any(line in said for said in problems)]
        raise refusal([*problems, *more]) from error
    beside = "" if pairs.held_out is None else f" to train on, {len(pairs.held_out)} to validate on"
    print(f"{len(pairs.training)} pairs{beside}, all readable")
    if problems:
        raise refusal(problems)


def evaluate(options: argparse.Namespace) -> None:
    """Measure base, LoRAs and a copy of the input on pairs that were not trained on."""
    from qwen_image_finetune.evaluate import Request, evaluate

    given = {field.name: getattr(options, field.name) for field in fields(Request)}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    evaluate(Request(**values))


def report(options: argparse.Namespace) -> None:
    """Write one page about a run: data, settings, curves, samples, metrics, files."""
    from qwen_image_finetune.report import report

    print(report(options.version, options.output))


def compare(options: argparse.Namespace) -> None:
    """Write one page that shows runs side by side, with the difference of their settings."""
    from qwen_image_finetune.compare import compare

    print(compare(options.versions, options.output))


def plan(options: argparse.Namespace) -> None:
    """Predict the memory that training takes, and say what makes it fit a card."""
    from qwen_image_finetune.config import load_config
    from qwen_image_finetune.plan_words import describe

    config = load_config(options.config, options.overrides)
    tell(config.notes)
    print(describe(config, options.card))


def bench(options: argparse.Namespace) -> None:
    """Measure training steps of a full-size model with random weights, one setting beside the other."""
    from qwen_image_finetune.bench import Options, run

    given: dict[str, Any] = {}
    for field in fields(Options):
        value = getattr(options, field.name)
        given[field.name] = tuple(value) if isinstance(value, list) else value
    run(Options(**given))


def export(options: argparse.Namespace) -> None:
    """Write a LoRA file in the key dialect of another program."""
    from qwen_image_finetune.families import get_family
    from qwen_image_finetune.levers.lora_files import export_lora

    export_lora(options.lora, options.output, options.format, get_family(options.family).pipeline)
    print(options.output)


def tiny(options: argparse.Namespace) -> None:
    """Write a tiny random checkpoint of a family's real architecture."""
    from qwen_image_finetune.families import get_family

    get_family(options.family).tiny(options.folder)
    print(options.folder)


def tell(notes: Sequence[str]) -> None:
    """What the reader of a configuration should know, once per run however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    from qwen_image_finetune.families import FAMILIES

    parser = argparse.ArgumentParser("qif", description="Fine-tune image-editing models on pairs of pictures.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(run: Callable[[argparse.Namespace], None], configured: bool = True) -> argparse.ArgumentParser:
        added = verbs.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        if configured:
            added.add_argument("config", type=Path, help="the configuration, a YAML file")
        return added

    def overridable(added: argparse.ArgumentParser) -> None:
        added.add_argument("overrides", nargs="*", metavar="section.key=value", help="instead of what the file says")

    training = verb(train)
    training.add_argument("--dry-run", action="store_true", help="say what would be loaded, trained and written")
    overridable(training)
    overridable(verb(cache))
    overridable(verb(check))

    drawing = verb(predict)
    drawing.add_argument("--prompt", required=True, help="the instruction")
    source = drawing.add_argument_group("what is edited")
    source.add_argument(
        "--image", dest="images", metavar="PICTURE", type=Path, action="append", default=[],
        help="reference; given repeatedly, the references of one picture",
    )  # fmt: skip
    source.add_argument("--folder", type=Path, help="instead: edit each picture of this folder on its own")
    drawing.add_argument("--lora", help="LoRA file, checkpoint or version folder, or hub id")
    drawing.add_argument("--strength", type=float, default=1.0, help="of the LoRA; 0 is the base")
    drawing.add_argument(
        "--output", type=Path, default=Path("output.png"), help="file of the picture, or a folder for several"
    )
    drawing.add_argument("--count", type=int, default=1, help="pictures of each, with seeds from --seed on")
    drawing.add_argument("--seed", type=int, default=0, help="of the noise")
    drawing.add_argument("--steps", type=int, help="sampler steps; default: the model's own")
    drawing.add_argument("--guidance", type=float, help="guidance scale; default: the model's own")
    drawing.add_argument("--negative-prompt", help="what classifier-free guidance steers away from")
    drawing.add_argument("--image-guidance", type=float, default=1.0, help="guidance towards the references")
    drawing.add_argument(
        "--width", type=int, help="of the picture; default: that of the reference as the model sees it"
    )
    drawing.add_argument("--height", type=int, help="the same for its height")
    overridable(drawing)

    evaluating = verb(evaluate, configured=False)
    evaluating.add_argument("config", type=Path, help="the configuration, or the version folder of a run")
    evaluating.add_argument("dataset", type=Path, help="folder of pairs that were not trained on")
    overridable(evaluating)
    evaluating.add_argument("--lora", nargs="+", default=[], help="LoRA files, checkpoint folders or hub ids")
    evaluating.add_argument(
        "--checkpoints", nargs="+", default=[], metavar="WHICH",
        help="of the run: all, best, latest, or steps; default: best, else latest",
    )  # fmt: skip
    evaluating.add_argument("--strength", type=float, nargs="+", default=[1.0], help="strengths of every LoRA")
    evaluating.add_argument("--output", type=Path, help="folder; default: evaluation, in the run where one is given")
    evaluating.add_argument("--count", type=int, help="pairs, spread over the folder; default: all")
    evaluating.add_argument("--seed", type=int, default=0, help="of the noise of the first pair; the next has the next")
    evaluating.add_argument("--steps", type=int, help="sampler steps; default: the model's own")
    evaluating.add_argument("--guidance", type=float, help="guidance scale; default: the model's own")

    reporting = verb(report, configured=False)
    reporting.add_argument("version", type=Path, help="version folder of a run")
    reporting.add_argument("--output", type=Path, help="file; default: report.html in the run")

    comparing = verb(compare, configured=False)
    comparing.add_argument(
        "versions", type=Path, nargs="+", help="version folders of runs, the first the one compared with"
    )
    comparing.add_argument("--output", type=Path, default=Path("compare.html"), help="file")

    planning = verb(plan)
    planning.add_argument("--card", help="its memory, such as 24GB, or its name, such as H100; default: this machine's")
    overridable(planning)

    measuring = verb(bench, configured=False)
    measuring.add_argument("family", choices=sorted(FAMILIES), help="whose architecture")
    measuring.add_argument("variants", nargs="*", help="rows beside the baseline; default: all that can run here")
    measuring.add_argument("--size", type=int, nargs=2, default=(1024, 1024), help="width and height in pixels")
    measuring.add_argument("--batch", type=int, default=1, help="samples a step")
    measuring.add_argument("--rank", type=int, default=16, help="of the adapter")
    measuring.add_argument("--steps", type=int, default=5, help="timed steps of each row")
    measuring.add_argument("--rounds", type=int, default=2, help="over all rows, each built anew in each")
    measuring.add_argument(
        "--card", dest="cards", action="append", default=[], metavar="24GB",
        help="a row with the settings that make the run fit such a card, and no more memory than it has; repeatable",
    )  # fmt: skip
    measuring.add_argument("--peak-tflops", type=float, help="of the card's matrix products, for the utilisation")
    measuring.add_argument("--output", type=Path, help="JSON file to write")
    measuring.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs, on a CPU say")

    exporting = verb(export, configured=False)
    exporting.add_argument("lora", type=Path, help="LoRA file, or the checkpoint or version folder it is in")
    exporting.add_argument("output", type=Path, help="file to write")
    exporting.add_argument("--format", choices=("diffusers", "comfy", "kohya"), default="comfy", help="key dialect")
    exporting.add_argument("--family", choices=sorted(FAMILIES), required=True, help="whose LoRA it is")

    sketching = verb(tiny, configured=False)
    sketching.add_argument("family", choices=sorted(FAMILIES), help="whose architecture")
    sketching.add_argument("folder", type=Path, help="where to write it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
