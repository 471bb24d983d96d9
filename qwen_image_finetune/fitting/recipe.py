"""The numbers a run starts with, in one place: `qif init` writes them, docs/recipe.md shows them.

`python -m qwen_image_finetune.fitting.recipe docs/recipe.md` writes its tables anew between the marks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.families import FAMILIES, get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting.estimate import GIB, Estimate, Estimator
from qwen_image_finetune.fitting.plan import Change, encoders_that_fit, fastest_that_fits, with_keys
from qwen_image_finetune.fitting.plan_words import card_named, step_seconds, step_words

BEGIN, END = "<!-- recipe: written by python -m qwen_image_finetune.fitting.recipe -->", "<!-- end of recipe -->"

RANK = 16
RATE = 1e-4
SMALL, SMALL_RATE = 100e6, 4e-3  # weights of a model that has few, such as the toy bases, and the rate for those
VISITS = 80  # of each pair
FEWEST, MOST = 500, 4000  # optimizer steps
SHARE, FEWEST_HELD_OUT, FEWEST_PAIRS = 0.1, 2, 8  # held out of training; of fewer pairs, none
ROUNDS = 8  # of validation in a run

# What the frozen base is quantised to, in the order of trying.
FORMATS: dict[str, tuple[str | None, ...]] = {
    "quality": (None, "fp8", "nf4"),
    "speed": ("fp8", "nf4", None),
    "memory": ("nf4", "fp8", None),
}
TOLD = {"RTX 4090": 24.0, "H100": 80.0}  # cards of the table of times, and their memory in GiB
RULES = (
    ("rank of the LoRA", str(RANK), "measured: on the toy bases other ranks moved the result by less than 0.02 IoU "
     "(toy/README.md)"),
    ("learning rate", f"{RATE:g}", "diffusers' example for FLUX.1 Kontext (examples/dreambooth, "
     "train_dreambooth_lora_flux_kontext.py)"),
    (f"learning rate of models below {SMALL / 1e6:.0f} million weights", f"{SMALL_RATE:g}",
     "measured: 3e-3 was no better on the toy bases (toy/README.md)"),
    ("optimizer steps, one pair a step", f"{VISITS} times the pairs, {FEWEST} to {MOST}",
     "measured on the toy bases: from 20 pairs, 80 visits of each came within 0.012 IoU of 160 (toy/README.md); the "
     "bounds are a choice, not measured: the held-out loss says when to stop"),
    ("held out", f"{SHARE:.0%}, at least {FEWEST_HELD_OUT} pairs; none of fewer than {FEWEST_PAIRS}",
     "a choice: the interval of a difference needs two pairs or more"),
)  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """Settings that make a run fit a card."""

    keys: dict[str, Any]
    estimate: Estimate
    seconds: float | None  # of a step, where it can be computed from what was measured
    words: str  # about the time of a step


def steps_for(pairs: int) -> int:
    """Optimizer steps for a data set, in round hundreds."""
    return round(min(max(VISITS * pairs, FEWEST), MOST), -2)


def share_for(pairs: int) -> float:
    """The share to hold out; 0 where there are too few."""
    return 0.0 if pairs < FEWEST_PAIRS else round(max(SHARE, FEWEST_HELD_OUT / pairs), 2)


def rate_for(weights: int) -> float:
    """The learning rate for a transformer of that many weights."""
    return SMALL_RATE if weights < SMALL else RATE


def fitted(family: Family, config: Config, folder: Path | None, prefer: str, card: str | None, memory: int) -> Fitted:
    """The first format of `FORMATS[prefer]`, with its fastest setting, that the planner finds to fit.

    Args:
        folder: the checkpoint, where it lies on this machine.
        card: its name or memory, for the time of a step; None is this machine's.
        memory: bytes of the card.

    Raises:
        ConfigError: nothing fits.
    """
    for format in FORMATS[prefer]:
        keys: dict[str, Any] = {} if format is None else {"model.quantize": format}
        if format == "fp8":
            keys["train.compile"] = True
        estimator = Estimator(family, with_keys(config, keys), folder)
        narrower, _ = encoders_that_fit(estimator, memory)
        keys |= narrower
        estimator.config = with_keys(estimator.config, narrower)
        found = fastest_that_fits(estimator, memory)
        if found is not None:
            change, estimate = _frugal(estimator, memory) if prefer == "memory" else found
            keys |= change.keys
            told = estimator, with_keys(config, keys), format, card_named(card), card is None
            return Fitted(keys, estimate, step_seconds(*told), step_words(*told))
    raise ConfigError(
        f"nothing makes {config.model.pretrained_model_name_or_path} fit {memory / GIB:.1f} GiB at its own size: "
        "name a smaller model, or a larger card"
    )


def _frugal(estimator: Estimator, memory: int) -> tuple[Change, Estimate]:
    """The whole forward pass computed again, and blocks swapped only if the run does not fit otherwise."""
    keys = {"train.gradient_checkpointing": True, "train.keep_activations": "none", "train.memory": "as_written"}
    estimate = estimator.estimate(with_keys(estimator.config, keys))
    if estimate.fits(memory):
        return Change(keys, "time"), estimate
    found = fastest_that_fits(estimator, memory)
    assert found is not None  # asked before
    return found


def tables() -> str:
    """Markdown: the rules with where they come from, and what a 24 GB card takes, as computed."""
    lines = ["| what | value | where it comes from |", "|---|---|---|"]
    lines += [f"| {what} | {value} | {reason} |" for what, value, reason in RULES]
    lines += ["", "| model | on 24 GB, `--prefer speed` | a step on an RTX 4090 | a step on an H100, and 50 pairs |"]
    lines += ["|---" * 4 + "|"]
    lines += list(_hours())
    return "\n".join(lines) + "\n"


def _hours() -> Iterator[str]:
    for family in map(get_family, FAMILIES):
        for one in family.published:
            values = {"model": {"pretrained_model_name_or_path": one.name}, "train": {"trainer": family.name},
                      "cache": {"use_cache": True}}  # fmt: skip
            config = Config.model_validate(values)
            small, large = (fitted(family, config, None, "speed", card, int(size * GIB)) for card, size in TOLD.items())
            swapped = small.keys.get("train.blocks_to_swap", 0)
            words = f"{small.keys.get('model.quantize', '16 bits')}" + f", {swapped} blocks swapped" * bool(swapped)
            seconds = large.seconds
            hours = "-" if seconds is None else f"about {seconds:.2f} s, {steps_for(50) * seconds / 3600:.1f} h"
            yield f"| `{one.name}` | {words} | {small.words.removeprefix('a step: ').partition(' s,')[0]} s | {hours} |"


def main(files: list[str]) -> None:
    for file in map(Path, files):
        before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        write_atomic(file, f"{before}{BEGIN}\n{tables()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
