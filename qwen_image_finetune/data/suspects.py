"""What a data set may hold and hardly anyone means, as one line each. Legal all of it: some data is meant so."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen_image_finetune.data import shards
from qwen_image_finetune.data.geometry import Plan, same_aspect
from qwen_image_finetune.data.hashes import groups
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.data.looks import Decoded, Look, Stamp
from qwen_image_finetune.records import Extent

CUT_OFF = 0.1  # share of a target's area above which a crop that nobody asked for is mentioned
ENLARGED = 2.0  # factor of a side above which a target is too small for what it is trained at
NEAR_COLOURS = 16.0  # of 255: a copy that is 15 % brighter differs by no more on average
FEW = 10  # pairs below which a note is worth it
_NAMED = 3  # keys in a line


def unchanged(row: Row) -> bool:
    """Whether the first reference and the target are the same file, byte for byte; sizes tell most of them apart."""
    if not row.reference_names:
        return False
    source, target = os.path.join(row.folder, row.reference_names[0]), os.path.join(row.folder, row.target_name)
    if shards.member_of(source) is not None:
        return shards.digest(source) == shards.digest(target)
    return os.path.getsize(source) == os.path.getsize(target) and filecmp.cmp(source, target, shallow=False)


def unchanged_problem(rows: Sequence[Row]) -> list[str]:
    """That no pair has anything to learn from, as a list of one line; the first pair that has ends the search."""
    if not rows or not all(map(unchanged, rows)):
        return []
    return [
        f"every one of {len(rows)} pairs has the same picture as source and target: nothing to learn from them; "
        "control_images is before the edit, training_images after it"
    ]


def few_note(count: int) -> list[str]:
    """That a data set is small enough to be learnt by heart."""
    if not 0 < count < FEW:
        return []
    return [
        f"{count} {'pair' if count == 1 else 'pairs'}: so few are learnt by heart rather than understood; most edits "
        "need ten to fifty, and train.max_train_steps should be small"
    ]


def caption_note(rows: Sequence[Row], empty: Sequence[int]) -> list[str]:
    """How many prompts say nothing.

    Args:
        empty: numbers of the rows whose prompt is empty.
    """
    if not empty:
        return []
    if len(empty) == len(rows):
        return [f"all {len(rows)} captions are empty: what is learned will not depend on the prompt"]
    return [f"{len(empty)} of {len(rows)} captions are empty ({_keys(rows, empty)})"]


def aspect_note(rows: Sequence[Row], extents: NDArray[np.uint32], first: NDArray[np.int64]) -> list[str]:
    """How many first references have another aspect ratio than their target.

    Args:
        extents: width and height in pixels of every file, (files, 2).
        first: place of each row's target in it, (rows,) or longer; the first reference comes next.
    """
    paired = np.array([index for index, row in enumerate(rows) if row.reference_names], dtype=np.int64)
    targets, sources = extents[first[paired]].tolist(), extents[first[paired] + 1].tolist()
    other = [
        index
        for index, source, target in zip(paired.tolist(), sources, targets, strict=True)
        if not same_aspect((source[0], source[1]), (target[0], target[1]))
    ]
    if not other:
        return []
    return [
        f"{len(other)} of {len(paired)} sources have another aspect ratio than their target ({_keys(rows, other)}): "
        "the model learns to zoom or to shift; where the edit keeps the frame, crop both alike"
    ]


def enlargement(plan: Plan) -> float:
    """By how much the sides of a target grow on the way to its final size: the root of the factor of its area."""
    left, upper, right, lower = plan.target.box
    width, height = plan.target.size
    return float(((width * height) / ((right - left) * (lower - upper))) ** 0.5)


def enlarged_note(rows: Sequence[Row], factors: Mapping[int, float]) -> list[str]:
    """How many targets have far fewer pixels than they are trained at.

    Args:
        factors: `enlargement` of each row, by its number.
    """
    small = [index for index, factor in factors.items() if factor > ENLARGED]
    if not small:
        return []
    return [
        f"{len(small)} of {len(rows)} targets are enlarged to be trained on, up to {max(factors.values()):.1f} times "
        f"in width and height ({_keys(rows, small)}): the model learns their blur; take larger pictures, or a smaller "
        "data.init_args.resolution or image_size"
    ]


def cut_off_note(extents: NDArray[np.uint32], image_size: Extent) -> list[str]:
    """How much of the targets a fixed shape cuts off, where that is much.

    Args:
        extents: width and height in pixels of every target, (rows, 2); zeros of one that cannot be read.
        image_size: width and height of what is trained on.
    """
    extents = extents[extents.all(axis=1)]
    if not len(extents):
        return []
    ratios = extents[:, 0] / extents[:, 1] * image_size[1] / image_size[0]
    lost = 1 - np.minimum(ratios, 1 / ratios)
    count = int((lost > CUT_OFF).sum())
    if not count:
        return []
    return [
        f"data.init_args.image_size={list(image_size)} cuts up to {lost.max():.0%} off {count} of {len(extents)} "
        "targets, at their edges; delete it to keep each picture's own shape"
    ]


def look_notes(rows: Sequence[Row], looks: Mapping[int, Look]) -> Iterator[str]:
    """What decoded pictures tell.

    Args:
        looks: of all rows that were decoded, by their numbers.
    """
    same = [index for index, look in looks.items() if look.unchanged]
    if same:
        yield (
            f"{len(same)} of {len(looks)} pairs have the same picture as source and target ({_keys(rows, same)}): "
            "nothing to learn from them"
        )
    shifted = {index: look.shift for index, look in looks.items() if look.shift}
    if shifted:
        yield (
            f"{len(shifted)} of {len(looks)} targets are shifted against their source, by up to about "
            f"{max(shifted.values()):.0f} pixels ({_keys(rows, shifted)}): the model learns the shift as well"
        )
    originals: dict[bytes, int] = {}
    copies = {
        index: one for index, look in looks.items() if (one := originals.setdefault(look.content, index)) != index
    }
    if copies:
        yield (
            f"{len(copies)} of {len(looks)} pairs are copies of another, with the same pictures and prompt "
            f"({_listed(f'{rows[index].key} of {rows[one].key}' for index, one in copies.items())}): they count more "
            "than the others"
        )


def remark_notes(rows: Sequence[Row], decoded: Mapping[int, Decoded]) -> Iterator[str]:
    """Profiles that were applied, profiles and orientations that cannot be read: each kind once."""
    found: dict[str, list[int]] = {}
    for index, row in decoded.items():
        for remark in dict.fromkeys(row.remarks):
            found.setdefault(remark, []).append(index)
    for remark, indices in found.items():
        yield f"{len(indices)} of {len(decoded)} pairs have a picture of this kind ({_keys(rows, indices)}): {remark}"


def near_copies_note(rows: Sequence[Row], decoded: Mapping[int, Decoded], prompts: Mapping[int, str]) -> list[str]:
    """How many pairs look like another, with the same prompt, and are not equal to it to the pixel.

    One picture may be the source of several edits: both source and target must look alike.
    """
    indices = [index for index, row in decoded.items() if row.look is not None and not row.look.unchanged]
    stamps = [decoded[index].stamps for index in indices]
    firsts, lasts = (np.array([each[place].hashes for each in stamps], dtype=np.uint64) for place in (0, -1))
    labels = zip(*(groups(hashes.reshape(-1, 2)).tolist() for hashes in (firsts, lasts)), strict=True)
    alike: dict[tuple[int, int, str], list[int]] = {}
    for index, label in zip(indices, labels, strict=True):
        alike.setdefault((*label, prompts[index]), []).append(index)
    pairs = []
    for first, *others in alike.values():
        for other in others:
            one, two = decoded[first], decoded[other]
            assert one.look is not None and two.look is not None
            if one.look.content != two.look.content and all(map(_same_colours, one.stamps, two.stamps)):
                pairs.append(f"{rows[other].key} and {rows[first].key}")
    if not pairs:
        return []
    return [
        f"{len(pairs)} of {len(decoded)} pairs look like another with the same prompt ({_listed(pairs)}): near-copies "
        "count more than the others"
    ]


def _same_colours(one: Stamp, other: Stamp) -> bool:
    """Flat pictures have the same hash whatever their colour."""
    ours, theirs = (np.frombuffer(each.colours, dtype=np.uint8).reshape(8, 8, 3).astype(int) for each in (one, other))
    return min(float(np.abs(ours - each).mean()) for each in (theirs, theirs[:, ::-1])) <= NEAR_COLOURS


def _keys(rows: Sequence[Row], indices: Iterable[int]) -> str:
    return _listed(rows[index].key for index in indices)


def _listed(names: Iterable[str]) -> str:
    """The first few, and whether there are more."""
    names = list(names)
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
