"""The table of models in the documentation is what families and planner say today."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.models import BEGIN, COLUMNS, END, IN_SHORT, line, row

ROOT = Path(__file__).parents[2]
PAGES = {ROOT / "README.md": True, ROOT / "docs/models.md": False}  # whether its table is in short
CHECKPOINTS = [(name, one.name) for name in FAMILIES for one in get_family(name).published]


def lines(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return text.partition(IN_SHORT if PAGES[page] else BEGIN)[2].partition(END)[0].strip().splitlines()


@pytest.mark.parametrize("name,checkpoint", CHECKPOINTS)
def test_row_of_a_checkpoint(name: str, checkpoint: str) -> None:
    family = get_family(name)
    (one,) = (one for one in family.published if one.name == checkpoint)
    cells = row(family, one)
    for page, short in PAGES.items():
        assert line(cells, short) in lines(page), (
            "run: python -m qwen_image_finetune.fitting.models README.md docs/models.md"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_else_is_in_it(page: Path) -> None:
    assert lines(page)[0] == line(COLUMNS, PAGES[page])
    assert len(lines(page)) == 2 + len(CHECKPOINTS)


def test_examples_of_the_registry_are_published() -> None:
    for name, entry in FAMILIES.items():
        assert entry.example in [one.name for one in get_family(name).published]
