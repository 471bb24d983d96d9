"""What a data set may hold and hardly anyone means: pairs without a change, pictures cut off. Nothing is decoded."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen_image_finetune.data.geometry import Extent
from qwen_image_finetune.data.listing import Row

CUT_OFF = 0.1  # share of a target's area above which a crop that nobody asked for is mentioned


def unchanged(row: Row) -> bool:
    """Whether the first reference and the target are the same file, byte for byte; sizes tell most of them apart."""
    if not row.reference_names:
        return False
    source, target = os.path.join(row.folder, row.reference_names[0]), os.path.join(row.folder, row.target_name)
    return os.path.getsize(source) == os.path.getsize(target) and filecmp.cmp(source, target, shallow=False)


def unchanged_problem(rows: Sequence[Row]) -> list[str]:
    """That no pair has anything to learn from, as a list of one line; the first pair that has ends the search."""
    if not rows or not all(map(unchanged, rows)):
        return []
    return [
        f"every one of {len(rows)} pairs has the same picture as source and target: nothing to learn from them; "
        "control_images is before the edit, training_images after it"
    ]


def unchanged_note(rows: Sequence[Row]) -> list[str]:
    """How many pairs have nothing to learn from. Reads these whole: for a check that reads every file anyway."""
    count = sum(map(unchanged, rows))
    if not count:
        return []
    return [f"{count} of {len(rows)} pairs have the same picture as source and target: nothing to learn from them"]


def cut_off_note(extents: NDArray[np.uint32], image_size: Extent) -> list[str]:
    """How much of the targets a fixed shape cuts off, where that is much.

    Args:
        extents: width and height in pixels of every target, (rows, 2).
        image_size: width and height of what is trained on.
    """
    ratios = extents[:, 0] / extents[:, 1] * image_size[1] / image_size[0]
    lost = 1 - np.minimum(ratios, 1 / ratios)
    count = int((lost > CUT_OFF).sum())
    if not count:
        return []
    return [
        f"data.init_args.image_size={list(image_size)} cuts up to {lost.max():.0%} off {count} of {len(extents)} "
        "targets, at their edges; delete it to keep each picture's own shape"
    ]
