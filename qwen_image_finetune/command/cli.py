"""The command `qif`: one verb for each thing a person does. Heavy packages are imported by the verb that needs them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from qwen_image_finetune.command import running
from qwen_image_finetune.command.saying import loading, read_config, tell
from qwen_image_finetune.machine import console
from qwen_image_finetune.machine.streams import unfailing, unfailing_streams
from qwen_image_finetune.machine.threads import sleep_while_waiting

Asked = TypeVar("Asked")  # a dataclass of what a verb is asked for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 refused, 130/143 stopped by a signal."""
    from qwen_image_finetune.command.arguments import build_parser

    parser = build_parser(VERBS)
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
        from qwen_image_finetune.command.completion import suggest

        suggest(parser)
    options = parse(parser, arguments)
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
    if sys.platform == "win32":
        print(
            "error: Windows has no locks and signals of Unix, which runs are kept safe with: use WSL2", file=sys.stderr
        )
        return 2
    sleep_while_waiting()
    options.answer = Answer(sys.stdout)
    try:
        with unfailing_streams(), _words_aside(options):
            run(options)
    except (ValueError, RuntimeError, OSError) as error:
        if not type(error).__module__.startswith("qwen_image_finetune"):
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # several processes refuse the same: the launcher ends the others once the first has said it
        console.refuse(str(error))
        if getattr(options, "json", False) and not options.answer.given:
            options.answer({"error": str(error), "problems": list(getattr(error, "problems", ()) or [str(error)])})
        return 2
    return 0


class Answer:
    """What `--json` prints on standard output: one line, and nothing beside it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.given = stream, False

    def __call__(self, value: Any) -> None:
        print(json.dumps(value, ensure_ascii=False), file=unfailing(self.stream), flush=True)
        self.given = True


def _words_aside(options: argparse.Namespace) -> AbstractContextManager[object]:
    """With `--json`, what is said to a person goes to standard error."""
    return redirect_stdout(sys.stderr) if getattr(options, "json", False) else nullcontext()


# The verbs


def train(options: argparse.Namespace) -> None:
    """Train as the configuration says."""
    running.run_training(options.config, options.overrides, dry_run=options.dry_run)


def cache(options: argparse.Namespace) -> None:
    """Compute the embeddings of the data set and keep them."""
    running.run_training(options.config, options.overrides, only_cache=True)


def predict(options: argparse.Namespace) -> None:
    """Draw pictures: one from its references, or one for each picture of a folder."""
    loading()
    from qwen_image_finetune.config import load_config
    from qwen_image_finetune.drawing.draw import Request, draw
    from qwen_image_finetune.lora.sources import checkpoint_notes

    for lora in options.loras:
        tell(checkpoint_notes(lora))
    draw(load_config(options.config, options.overrides), filled(Request, options))


def check(options: argparse.Namespace) -> None:
    """Check configuration and data, decoding every picture, and load nothing else."""
    from qwen_image_finetune.command.check import check

    found = check(options.config, options.overrides, options.maps)
    if options.json:
        options.answer(found)


def evaluate(options: argparse.Namespace) -> None:
    """Measure base, LoRAs and a copy of the input on pairs that were not trained on."""
    loading()
    from qwen_image_finetune.judging.evaluate import evaluate
    from qwen_image_finetune.judging.request import Request

    given = options.dataset
    if given is not None and "=" in given and not Path(given).exists():  # an override that stands where a folder may
        options.overrides, given = [given, *options.overrides], None
    options.dataset = given
    found = evaluate(filled(Request, options))
    if options.json:
        options.answer(found)


def report(options: argparse.Namespace) -> None:
    """Write one page about a run: data, settings, curves, samples, metrics, files."""
    from qwen_image_finetune.judging.report import report

    print(report(options.version, options.output, options.overwrite))


def compare(options: argparse.Namespace) -> None:
    """Write one page that shows runs side by side, with the difference of their settings."""
    from qwen_image_finetune.judging.compare import compare

    print(compare(options.versions, options.output, options.overwrite))


def plan(options: argparse.Namespace) -> None:
    """Predict the memory that training takes, and say what makes it fit a card."""
    config = read_config(options.config, options.overrides)
    loading()
    if options.json:
        from qwen_image_finetune.fitting.plan_numbers import numbers
        from qwen_image_finetune.training.check import run_problems

        options.answer({**numbers(config, options.card, options.references), "problems": run_problems(config)})
        return
    from qwen_image_finetune.fitting.plan_words import describe

    print(describe(config, options.card, options.references))


def bench(options: argparse.Namespace) -> None:
    """Measure training steps of a full-size model with random weights, one setting beside the other."""
    from qwen_image_finetune.config import ConfigError
    from qwen_image_finetune.config.registry import FAMILIES

    if options.quick:
        running.quick_bench(Path(options.family), [*options.variants, *options.overrides])
        return
    if options.family not in FAMILIES:
        hint = "; of a configuration, --quick is measured" if Path(options.family).is_file() else ""
        raise ConfigError(f"{options.family!r} is none of {', '.join(sorted(FAMILIES))}{hint}")
    loading()
    from qwen_image_finetune.fitting.bench import Options, run

    run(filled(Options, options))


def export(options: argparse.Namespace) -> None:
    """Write a LoRA, or a transformer that was tuned as a whole, as one file for another program."""
    loading()
    from qwen_image_finetune.families import get_family
    from qwen_image_finetune.lora.export import export
    from qwen_image_finetune.lora.sources import checkpoint_notes

    naming = get_family(options.family).naming
    notes = export(options.lora, options.output, options.format, naming, options.overwrite)
    tell([*checkpoint_notes(options.lora), *notes])
    print(options.output)


def average(options: argparse.Namespace) -> None:
    """Write the mean of saved checkpoints of a run, as a folder that is used like one of them."""
    loading()
    from qwen_image_finetune.training.checkpoint_average import Request, average

    for folder, share in average(filled(Request, options)):
        print(f"{share:.3f} of {folder}")
    print(options.output)


def lora(options: argparse.Namespace) -> None:
    """Look at LoRA files and make others of them: show, convert, resize, add, compare, extract, merge."""
    loading()
    from qwen_image_finetune.command.lora import tools

    found = tools.run(options)
    if getattr(options, "json", False):
        options.answer(found)


def studio(options: argparse.Namespace) -> None:
    """Open a page in the browser: pictures, runs and results of a folder."""
    from qwen_image_finetune.command.extras import need

    need("studio", "starlette", "uvicorn", "jinja2")
    from qwen_image_finetune.studio.server import serve

    serve(options.folder, options.host, options.port)


def init(options: argparse.Namespace) -> None:
    """Ask four things, look at the pairs, and write a configuration that fits."""
    from qwen_image_finetune.command.init import Answers, init

    init(filled(Answers, options))


def convert(options: argparse.Namespace) -> None:
    """Turn the project of another trainer into a configuration, saying what becomes of each key."""
    from qwen_image_finetune.command.convert.run import Request, convert

    found = convert(filled(Request, options))
    if options.json:
        options.answer(found)


def doctor(options: argparse.Namespace) -> None:
    """Say what this machine can do for a run: each line is good, or says what to do."""
    from qwen_image_finetune.command.doctor import doctor

    doctor(options.answer if options.json else None)


def push(options: argparse.Namespace) -> None:
    """Send a run to the hub: weights, a card about it, held-out measures and pictures. Shown before it is sent."""
    loading()
    from qwen_image_finetune.command.push import Request, push

    push(filled(Request, options))


def demo(options: argparse.Namespace) -> None:
    """See it learn: small models of two families, each a LoRA from twenty pairs, and one page about it."""
    if options.files_only:
        from qwen_image_finetune.command.materials import put_there

        put_there(options.folder)
        return
    from qwen_image_finetune.command.demo import demo

    demo(options.folder, main)


def completion(options: argparse.Namespace) -> None:
    """Print what makes a shell complete verbs, options and keys; its help says where it goes."""
    from qwen_image_finetune.command.completion import script

    print(script(options.shell))


def tiny(options: argparse.Namespace) -> None:
    """Write a tiny random checkpoint of a family's real architecture."""
    loading()
    from qwen_image_finetune.families import get_family

    get_family(options.family).tiny(options.folder)
    print(options.folder)


VERBS = (
    init, convert, train, cache, check, predict, evaluate, report, compare, plan, bench, export, lora, average, push,
    studio, doctor, demo, completion, tiny,
)  # fmt: skip


def filled(request: type[Asked], options: argparse.Namespace) -> Asked:
    """A dataclass whose fields are options of the same names; options that can be repeated become tuples."""
    given = {field.name: getattr(options, field.name) for field in fields(cast(Any, request))}
    return request(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
