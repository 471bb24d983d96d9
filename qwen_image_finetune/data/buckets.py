"""A bounded number of sizes: which of the sizes that a data set has are kept, so that the others lose least to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen_image_finetune.records import Extent

CANDIDATES = 256  # of sizes that may be kept, the most frequent ones: the search takes their cube


def lost(size: Extent, bucket: Extent) -> float:
    """Share of a picture that is cut off where it is scaled to cover another size."""
    return 1 - min(_ratio(size) / _ratio(bucket), _ratio(bucket) / _ratio(size))


def chosen(counts: Mapping[Extent, int], most: int) -> list[Extent]:
    """At most so many of some sizes, such that the pictures, each in the nearest one, lose least in all.

    Sizes are in a line, by their aspect ratio, and each bucket takes a stretch of it: the best cut into stretches is
    found by dynamic programming, exactly.

    Args:
        counts: of each size (width, height) how many pictures have it.
    """
    if len(counts) <= most:
        return sorted(counts)
    sizes = sorted(sorted(counts, key=lambda size: (-counts[size], size))[:CANDIDATES], key=_ratio)
    number = len(sizes)
    ratios = np.array([_ratio(size) for size in sizes])
    losses = 1 - np.minimum(ratios / ratios[:, None], ratios[:, None] / ratios)  # (bucket, size): `lost`
    weights = np.array([counts[size] for size in sizes], dtype=np.float64)
    # Of each bucket (row) what the first n sizes lose to it.
    sums = np.concatenate([np.zeros((number, 1)), np.cumsum(weights * losses, axis=1)], axis=1)
    best = np.concatenate([[0.0], np.full(number, np.inf)])  # what the first n sizes lose in the stretches so far
    cuts: list[list[tuple[int, int]]] = []  # per stretch, of each end: where the last one begins, and its bucket
    for _ in range(min(most, number)):
        now, cut = np.full(number + 1, np.inf), [(0, 0)] * (number + 1)
        now[0] = 0.0
        for end in range(1, number + 1):
            total = best[None, :end] + sums[:, end, None] - sums[:, :end]  # (bucket, begin)
            bucket, begin = divmod(int(total.argmin()), end)
            now[end], cut[end] = total[bucket, begin], (begin, bucket)
        best = now
        cuts.append(cut)
    kept, end = set(), number
    for cut in reversed(cuts):
        if end:
            end, bucket = cut[end]
            kept.add(sizes[bucket])
    return sorted(kept)


def nearest(size: Extent, buckets: Sequence[Extent]) -> Extent:
    """The one of some sizes that a picture loses least to."""
    return min(buckets, key=lambda bucket: (lost(size, bucket), bucket))


def _ratio(size: Extent) -> float:
    return size[0] / size[1]
