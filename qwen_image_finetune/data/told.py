"""What a data set says of itself: which share each of its parts has, what its pairs have several of, what they lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

from qwen_image_finetune.data.batches import Share, allotted
from qwen_image_finetune.data.buckets import lost, nearest
from qwen_image_finetune.data.captions import has_several
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.records import Extent


def shares_of(rows: Sequence[Row]) -> list[Share]:
    """The data sets that rows are of, as `Batches` takes them."""
    members: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row.shared.number, []).append(index)
    shared = {number: rows[own[0]].shared for number, own in members.items()}
    return [Share(own, shared[number].repeats, shared[number].weight) for number, own in members.items()]


def about_sets(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each thing that several data sets, or one with settings of its own, should say."""
    shares = shares_of(rows)
    visits = allotted(shares)
    if any(share.weight is not None or share.repeats > 1 for share in shares):
        each = ", ".join(
            f"{count} ({count / sum(visits):.0%}) to the {len(share.rows)} of {rows[share.rows[0]].shared.name}"
            for share, count in zip(shares, visits, strict=True)
        )
        yield f"an epoch has {sum(visits)} visits: {each}"
    for share in shares:
        shared, count = rows[share.rows[0]].shared, len(share.rows)
        if shared.identity:
            asked = ", ".join(map(repr, shared.identity))
            yield f"{count} identity pairs of {shared.name}: the source as it is, asked for with {asked}"
        if len(shared.areas) > 1:
            sides = ", ".join(f"{sqrt(area):g}" for area in shared.areas)
            yield f"visits to each of the {count} pairs of {shared.name} take turns at the sizes {sides}"
    several = [row for row in rows if has_several(row) and not row.shared.identity]
    if several:
        yield f"{len(several)} of {len(rows)} rows may have several prompts, of which one is drawn a visit"


def about_files(rows: Sequence[Row], use_edit_mask: bool) -> Iterator[str]:
    """How many references rows have, and which lack a mask."""
    counts = Counter(len(row.reference_names) for row in rows)
    if set(counts) == {0}:
        yield "no row has a reference: training on captions alone"
    elif len(counts) > 1:
        shares = ", ".join(f"{number} rows with {count}" for count, number in sorted(counts.items()))
        yield f"rows differ in the number of references: {shares}"
    without = sum(row.mask_name is None for row in rows)
    if use_edit_mask and 0 < without < len(rows):
        yield f"{without} of {len(rows)} rows have no edit mask and count as foreground everywhere"


def about_buckets(own: Mapping[Extent, int], kept: Sequence[Extent], area: int | None) -> str:
    """How many sizes targets have, and what that costs them.

    Args:
        own: how many would have which size without a bound.
        kept: the sizes that stand for them.
        area: that they are of.
    """
    total = sum(own.values())
    at = "" if area is None else f" at {sqrt(area):g}"
    cut = {size: lost(size, nearest(size, kept)) for size in own}
    mean = sum(cut[size] * count for size, count in own.items()) / total
    sizes = ", ".join(f"{width} x {height}" for width, height in kept)
    return (
        f"targets{at} have {len(kept)} sizes in place of {len(own)} (data.init_args.max_buckets): {sizes}; "
        f"{mean:.1%} of a picture is cut off on average, {max(cut.values()):.1%} at most"
    )
