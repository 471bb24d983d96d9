"""What cannot be encoded: found by tokenizers, sizes and the pictures themselves, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import DiffusionPipeline

from qwen_image_finetune import loading
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.geometry import Plan
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.data.listing import unwritable
from qwen_image_finetune.families.base import Family, References
from qwen_image_finetune.machine import console
from qwen_image_finetune.records import Extent

_NAMED = 3  # captions in a note

if TYPE_CHECKING:
    from qwen_image_finetune.encoding.cache import EncodedDataset


def prompt_faults(
    family: Family, pipe: DiffusionPipeline, prompt: str, target: Extent, references: References
) -> tuple[list[str], str | None]:
    """(why a prompt cannot be encoded beside such pictures, how much of it is read where that is not all).

    Args:
        pipe: its tokenizers.
        target: (width, height) of the picture that is drawn.
    """
    if broken := unwritable(prompt):
        return [broken], None
    if words := family.control_words(pipe, prompt):
        return [
            f"{', '.join(words)} would be read as a control token of the model, not as text: take it out, or write it "
            "otherwise"
        ], None
    room = family.room(pipe, target, references)
    if room is None:
        return [], None
    tokens = len(family.prompt_tokens(pipe, prompt))
    if tokens <= room.tokens:
        return [], None
    if room.cut:
        return [], f"{tokens} tokens, the first {room.tokens} are read"
    if room.tokens <= 0:
        return ["pictures as large as these leave the model no room for a prompt: give them fewer pixels"], None
    return [f"a prompt of {tokens} tokens; beside these pictures the model reads {room.tokens}: shorten it"], None


def reference_faults(family: Family, references: References) -> Iterator[tuple[int, str]]:
    """(place of a reference, why it cannot be shown to the model)."""
    for place, reference in enumerate(references):
        if fault := family.reference_fault(*reference):
            yield place, fault


def shown_references(plan: Plan) -> list[tuple[Extent, Extent]]:
    """The references of a row as `prompt_faults` takes them."""
    boxes = [(picture.box, picture.size) for picture in plan.references]
    return [((right - left, lower - upper), size) for (left, upper, right, lower), size in boxes]


def reference_problems(family: Family, dataset: ImageDataset) -> list[str]:
    """One line for each reference of a data set that the family cannot take."""
    return list(dict.fromkeys(line for index in range(len(dataset)) for line in row_problems(family, dataset, index)))


def row_problems(family: Family, dataset: ImageDataset, index: int) -> list[str]:
    """One line for each reference of a row that the family cannot take."""
    plan = dataset.plan(index)
    faults = reference_faults(family, shown_references(plan))
    return [f"{plan.references[place].path}: {fault}" for place, fault in faults]


def check_prompts(
    family: Family, checkpoint: Path, dataset: ImageDataset, rows: Sequence[int], preserved: Sequence[str] = ()
) -> None:
    """Refuse captions that the family cannot encode, and say once which are read in part.

    Args:
        preserved: the prompts of loss.preservation, which every row is seen with too.

    Raises:
        DataError: with all of them, one line each.
    """
    if not rows:
        return
    pipe = loading.load_tokenizers(family, checkpoint)
    problems: list[str] = []
    cut: list[str] = []
    layouts: dict[tuple[Extent, tuple[tuple[Extent, Extent], ...]], None] = {}
    for index in rows:
        row, plan = dataset.rows[index], dataset.plan(index)
        shown = shown_references(plan)
        layouts.setdefault((plan.target.size, tuple(shown)))
        name = row.caption or f"the prompt of {row.target}"
        for prompt in dataset.prompts(index):
            faults, read = prompt_faults(family, pipe, prompt, plan.target.size, shown)
            problems += [f"{name}: {fault}" for fault in faults]
            cut += [f"{name}: {read}"] if read else []
    for prompt in preserved:
        found = {fault for layout in layouts for fault in prompt_faults(family, pipe, prompt, *layout)[0]}
        problems += [f"loss.preservation.prompts, {prompt!r}: {fault}" for fault in sorted(found)]
    if problems:
        raise DataError(problems)
    if cut:
        more = ", ..." if len(cut) > _NAMED else ""
        console.note(
            f"{len(cut)} of {len(rows)} prompts are longer than the model reads ({'; '.join(cut[:_NAMED])}{more})"
        )


def check_pictures(dataset: ImageDataset, rows: Sequence[int]) -> None:
    """Decode every picture of some rows: damage behind a header would else end the run in the middle. Say what is odd.

    Raises:
        DataError: with all problems.
    """
    said = len(dataset.notes)
    problems = dataset.check(decode=True, rows=rows)
    if problems:
        raise DataError(problems)
    for line in dataset.notes[said:]:
        console.note(line)


def check_rows(data: EncodedDataset, rows: Sequence[int]) -> None:
    """Both of some rows that are about to be encoded.

    Raises:
        DataError: with all problems of their prompts; without any, with those of their pictures.
    """
    check_prompts(data.family, data.checkpoint, data.dataset, rows, data.preserved)
    check_pictures(data.dataset, rows)
