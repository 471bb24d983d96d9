"""The table of models in README and docs, from what the families say and what the planner finds.

`python -m qwen_image_finetune.fitting.models README.md docs/models.md` writes it anew between its two marks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from accelerate import init_empty_weights

from qwen_image_finetune.config import Config
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.families import FAMILIES, get_family
from qwen_image_finetune.families.base import Family, Published
from qwen_image_finetune.fitting.estimate import GIB, Estimator, transformer_config
from qwen_image_finetune.fitting.plan import changes
from qwen_image_finetune.lora.targets import endings, target_modules

BEGIN, END = "<!-- models: written by python -m qwen_image_finetune.fitting.models -->", "<!-- end of models -->"
IN_SHORT = BEGIN.replace("models:", "models in short:")
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GB of memory that cards are sold with
COLUMNS = (
    "model", "`train.trainer`", "weights", "references", "card", "smallest card", "a LoRA sits on", "licence"
)  # fmt: skip


SHORT = (0, 3, 5, 7)  # the columns of a page that begins with IN_SHORT


def line(cells: Sequence[str], short: bool) -> str:
    """A line of the table."""
    return f"| {' | '.join([cells[place] for place in SHORT] if short else cells)} |"


def table(short: bool) -> str:
    """Markdown: a row for each published checkpoint of each family."""
    lines = [line(COLUMNS, short), line(["---"] * len(COLUMNS), short).replace(" ", "")]
    lines += [line(cells, short) for cells in rows()]
    return "\n".join(lines) + "\n"


def rows() -> Iterator[tuple[str, ...]]:
    """Cells of the table."""
    for family in map(get_family, FAMILIES):
        for one in family.published:
            yield row(family, one)


def row(family: Family, one: Published) -> tuple[str, ...]:
    """Cells of one checkpoint: its transformer's weights, and the card that the planner finds for a LoRA of rank 16."""
    values = {
        "model": {"pretrained_model_name_or_path": one.name},
        "train": {"trainer": family.name},
        "cache": {"use_cache": True},
    }
    estimator = Estimator(family, Config.model_validate(values), None)
    targets = ", ".join(f"`{target}`" for target in target_endings(family, one))
    weights = f"{estimator.footprint.weights / 1e9:.1f} billion"
    references = f"up to {family.max_references}" if family.max_references > 1 else str(family.max_references)
    cards = smallest_card(estimator, swapping=False), smallest_card(estimator, swapping=True)
    return f"`{one.name}`", family.name, weights, references, *cards, targets, one.licence


def target_endings(family: Family, one: Published) -> tuple[str, ...]:
    """How the names of the modules end that a LoRA sits on; an expression is no reading."""
    if not isinstance(family.adapter_targets, str):
        return family.adapter_targets
    with init_empty_weights():
        model = cast(Any, family.transformer).from_config(transformer_config(family, None, one))
    return tuple(endings(target_modules(model, family.adapter_targets)))


def smallest_card(estimator: Estimator, swapping: bool) -> str:
    """The least memory that a LoRA at the model's own size fits into, and the precision of the base that it takes.

    Args:
        swapping: blocks may wait in host memory, which costs time.
    """
    for card in CARDS:
        for change, config, format in changes(estimator, card * GIB):
            swaps = "train.blocks_to_swap" in change.keys or "train.offload_activations" in change.keys
            if (swapping or not swaps) and estimator.estimate(config, format).fits(card * GIB):
                return f"{card} GB" + (f", {format}" if format else "")
    return "several cards"


def rewritten(text: str) -> str:
    """A page with the table of today between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    short = IN_SHORT in text
    before, begin, rest = text.partition(IN_SHORT if short else BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{begin}\n{table(short)}{END}{after}"


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        write_atomic(page, rewritten(page.read_text(encoding="utf-8")))
