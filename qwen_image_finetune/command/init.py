"""`qif init`: four questions, and a commented configuration that fits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image_finetune.command.written import REQUIRED, as_config, written
from qwen_image_finetune.config import Config, resolve_family
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.encoding.pairs import Pairs, open_pairs
from qwen_image_finetune.families import FAMILIES, get_family
from qwen_image_finetune.fitting import recipe, speed
from qwen_image_finetune.fitting.estimate import GIB, Estimator
from qwen_image_finetune.fitting.plan import card_memory, parse_memory
from qwen_image_finetune.fitting.plan_words import card_named
from qwen_image_finetune.levers.stored_precision import local_checkpoint
from qwen_image_finetune.machine.console import note, say

PREFERENCES = tuple(recipe.FORMATS)
COMMENTS = {
    "data.init_args.dataset_path": "pairs, by name (docs/data.md)",
    "train.max_train_steps": "{visits} visits of each pair; stop earlier if the held-out loss no longer falls",
    "model.lora.r": "rank",
    "model.quantize": "the frozen base, of fewer bits",
    "model.quantize_text_encoders": "the card is too small for them in 16 bits; docs/precision.md has the price",
    "train.compile": "faster products; the first step takes a minute longer",
    "train.blocks_to_swap": "blocks that wait in host memory: the card is too small for all of them",
    "train.keep_activations": "share of what is not computed twice",
    "validation.share": "kept out of training, drawn and measured every validation.steps",
    "cache.use_cache": "text and pictures are encoded once",
    "optimizer.init_args.lr": "learning rate",
}


class InitError(ValueError):
    """A question that cannot be answered as it was."""


@dataclass(frozen=True)
class Answers:
    """The four, and where the file goes. What is None is asked, where somebody can answer."""

    folder: Path | None
    model: str | None
    card: str | None
    prefer: str | None
    output: Path
    overwrite: bool


def init(answers: Answers) -> Path:
    """Look at the pairs, choose settings and write the configuration; returns its file.

    Raises:
        InitError: an answer is missing or means nothing.
        DataError: the pairs have problems, all of them listed. Nothing is written.
        ConfigError: nothing makes the model fit the card.
        OutputError: the file is there already.
    """
    check_output(answers.output, answers.overwrite, lambda file: False)
    folder = answers.folder or Path(asked("Folder of pairs?", "my_pairs"))
    model = named_model(answers.model or asked("Which model? A name, a hub id or a folder.", published()[0]))
    card = answers.card or offered("Which card? Its memory, its name, or this one.", "this one")
    prefer = answers.prefer or offered(f"What matters more: {', '.join(PREFERENCES)}?", "quality")
    if prefer not in PREFERENCES:
        raise InitError(f"{prefer!r} is none of {', '.join(PREFERENCES)}")
    values: dict[str, Any] = {
        REQUIRED: model, "data.init_args.dataset_path": str(folder), "data.batch_size": 1,
        "cache.use_cache": True, "logging.tracker_project_name": answers.output.stem,
    }  # fmt: skip
    values["train.trainer"] = family_of(model, as_config(values))
    family = get_family(values["train.trainer"])
    pairs = open_pairs(as_config(values), family, decode=True)
    number = len(pairs.training)
    checkpoint = local_checkpoint(as_config(values).model)
    weights = Estimator(family, as_config(values), checkpoint).footprint.weights
    values |= chosen(number, weights)
    fit = None
    if weights >= recipe.SMALL:
        named = None if card == "this one" else card
        fit = recipe.fitted(family, as_config(values), checkpoint, prefer, named, memory_of(card))
        values |= fit.keys
    open_validation(values, pairs)
    write_atomic(answers.output, "\n".join(text(values, number)) + "\n")
    say(f"{number} pairs, all readable; {answers.output} trains on them for {values['train.max_train_steps']} steps")
    if fit is not None:
        say(f"{fit.estimate.peak / GIB:.1f} GiB on the card, by the planner; {fit.words}")
    say(f"Next:  qif train {answers.output} --dry-run    shows all of it\n       qif train {answers.output}")
    return answers.output


def asked(question: str, usual: str) -> str:
    """What a person answers; an empty line is the usual answer.

    Raises:
        InitError: nobody can answer.
    """
    if not sys.stdin.isatty():
        raise InitError(f"{question} Nobody can answer here: give it as an option (qif init --help)")
    return input(f"{question} [{usual}] ").strip() or usual


def offered(question: str, usual: str) -> str:
    """What a person answers; the usual answer where nobody can."""
    return asked(question, usual) if sys.stdin.isatty() else usual


def published() -> list[str]:
    """Hub ids of the models that are known."""
    return [one.name for family in map(get_family, FAMILIES) for one in family.published]


def named_model(name: str) -> str:
    """The hub id that a part of its name means, in any case; anything else is a folder or a hub id itself.

    Raises:
        InitError: it means none, or several.
    """
    if Path(name).expanduser().exists() or name in published():
        return name
    found = [one for one in published() if name.lower() == one.split("/")[-1].lower()]
    found = found or [one for one in published() if name.lower() in one.lower()]
    if len(found) == 1:
        return found[0]
    if not found and name.count("/") == 1:
        return name
    raise InitError(f"{name!r} is {'none' if not found else 'several'} of {', '.join(found or published())}; "
                    "a folder or another hub id (OWNER/NAME) will do too")  # fmt: skip


def family_of(model: str, config: Config) -> str:
    """The value of train.trainer: known of a published name, read from any other checkpoint.

    Raises:
        InitError: it cannot be read.
    """
    known = [name for name in FAMILIES for one in get_family(name).published if one.name == model]
    family, source = (known[0], "published") if known else resolve_family(config, download=True)
    if source.startswith("assumed"):
        raise InitError(f"{model} cannot be reached, so that its family is not known: "
                        "download it first, or name its folder")  # fmt: skip
    return family


def memory_of(card: str) -> int:
    """Bytes of a card; "this one" is this machine's, all of it that is free.

    Raises:
        InitError: this machine has none.
        ConfigError: `card` is no card.
    """
    if card == "this one":
        memory = card_memory()
        if memory is None:
            raise InitError("this machine has no card: name the one that will train, such as --card 24GB")
        return memory
    named: speed.Card | None = card_named(card)
    return int(named.memory * GIB) if named is not None else parse_memory(card)


def chosen(pairs: int, weights: int) -> dict[str, Any]:
    """What the size of the data set and of the model decide."""
    steps = recipe.steps_for(pairs)
    values: dict[str, Any] = {
        "train.max_train_steps": steps,
        "train.checkpointing_steps": steps // recipe.ROUNDS,
        "optimizer.init_args.lr": recipe.rate_for(weights),
        "model.lora.r": recipe.RANK,
    }
    if weights < recipe.SMALL:
        values["model.lora.target_modules"] = "all-linear"
        values["train.mixed_precision"] = "no"
    if share := recipe.share_for(pairs):
        values |= {"validation.enabled": True, "validation.share": share, "validation.steps": steps // recipe.ROUNDS}
    return values


def open_validation(values: dict[str, Any], pairs: Pairs) -> None:
    """Leave validation out where the pairs look so much alike that none can be held out."""
    from qwen_image_finetune.data import alike

    if "validation.share" not in values:
        return
    try:
        alike.choose(pairs.training, values["validation.share"])
    except ValueError as error:
        note(f"no pairs are held out: {error}", sys.stderr)
        for key in ("validation.enabled", "validation.share", "validation.steps"):
            del values[key]


def text(values: dict[str, Any], pairs: int) -> Iterator[str]:
    """The lines of the file: what differs from the defaults and what a person changes first, with its comment."""
    yield f"# Written by `qif init` for {pairs} pairs. The numbers: docs/recipe.md. More keys: docs/configuration.md."
    visits = round(values["train.max_train_steps"] / pairs)
    yield from written(values, {key: words.format(visits=visits) for key, words in COMMENTS.items()})
