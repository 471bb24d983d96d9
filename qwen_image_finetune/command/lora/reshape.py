"""`qif lora resize` and `qif lora add`: another rank, and several LoRAs as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_image_finetune.command.lora.files import check_place, opened, plain
from qwen_image_finetune.command.lora.show import dialect_of
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora.export import Dialect, write_checked
from qwen_image_finetune.lora.factoring import Factored, resized, summed
from qwen_image_finetune.lora.header import LoraFileError


def resize(
    source: Path,
    output: Path,
    rank: int | None,
    energy: float | None,
    dialect: Dialect | None,
    family: str | None,
    overwrite: bool,
) -> list[str]:
    """Write a LoRA with smaller layers; returns what that leaves out and which programs read it.

    Without a dialect it is written in that of the file.

    Raises:
        LoraFileError: the file cannot be read or is no plain LoRA; neither rank nor energy is given.
        OutputError: the output may not be written.
    """
    if rank is None and energy is None:
        raise LoraFileError("how small? Give --rank, --energy or both")
    check_place(output, overwrite)
    file, family = opened(source, family)
    before = plain(file, "resized")
    made = {name: resized(layer, rank, energy) for name, layer in before.items()}
    metadata = {**file.metadata, "qif.family": family}
    layers = {name: factored.layer for name, factored in made.items()}
    words = write_checked(layers, output, dialect or dialect_of(file.path), get_family(family).naming, metadata)
    ranks = [sum(layer.rank for layer in each.values()) / len(each) for each in (before, layers)]
    return [*file.notes, f"mean rank {ranks[0]:.1f} -> {ranks[1]:.1f}", *left_out(made), *words]


def add(
    sources: Sequence[Path],
    strengths: Sequence[float],
    output: Path,
    rank: int | None,
    dialect: Dialect | None,
    family: str | None,
    overwrite: bool,
) -> list[str]:
    """Write one LoRA that does what several do together, each at its strength.

    Without a rank it is exact, and its layers have the sum of the ranks; without a dialect it is written in that of the
    first.

    Raises:
        LoraFileError: a file cannot be read, they are of two families, or there are more strengths than files.
        OutputError: the output may not be written.
    """
    if len(sources) < 2:
        raise LoraFileError("name two LoRA files or more")
    if strengths and len(strengths) != len(sources):
        raise LoraFileError(f"{len(sources)} files and {len(strengths)} strengths: give one for each, in their order")
    check_place(output, overwrite)
    files = [opened(source, family) for source in sources]
    if len(families := sorted({name for _, name in files})) > 1:
        raise LoraFileError(f"these are LoRAs of {' and of '.join(families)}: they change other weights")
    parts = [plain(file, "added to others") for file, _ in files]
    given = list(zip(parts, strengths or [1.0] * len(parts), strict=True))
    layers = {
        name: summed([(part[name], strength) for part, strength in given if name in part])
        for name in dict.fromkeys(name for part in parts for name in part)
    }
    notes = [note for file, _ in files for note in file.notes]
    if rank is not None:
        made = {name: resized(layer, rank) for name, layer in layers.items()}
        layers = {name: factored.layer for name, factored in made.items()}
        notes += left_out(made)
    metadata = {
        "qif.family": families[0],
        "qif.sum_of": ", ".join(
            f"{file.path.name} at {strength:g}" for (file, _), (_, strength) in zip(files, given, strict=True)
        ),
    }
    dialect = dialect or dialect_of(files[0][0].path)
    return [*notes, *write_checked(layers, output, dialect, get_family(families[0]).naming, metadata)]


def left_out(made: Mapping[str, Factored]) -> list[str]:
    """What smaller layers lack, as a whole and where most."""
    whole = sum(each.norm**2 for each in made.values()) ** 0.5
    lacking = sum(each.left**2 for each in made.values()) ** 0.5
    worst = sorted(made.items(), key=lambda item: item[1].error, reverse=True)[:3]
    shown = ", ".join(f"{name} {each.error:.2%}" for name, each in worst)
    return [f"left out: {lacking / whole if whole else 0.0:.2%} of the change; most of {shown}"]
