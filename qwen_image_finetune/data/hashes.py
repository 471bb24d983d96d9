"""Perceptual hashes of pictures, and which of many pictures look alike by them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Hashes = NDArray[np.uint64]

# Bits, of 64, in which near-duplicates may differ. Measured on the forty portraits of data/ and four photographs:
# copies at half the size, as JPEG of quality 40, 15 % brighter or of 20 % less contrast differ in 6 at most, different
# pictures in 10 at least. A crop of 2 % at each side differs in up to 9 and may pass; one of 5 % mostly does.
DISTANCE = 6


def difference_hash(picture: Image.Image) -> int:
    """64 bits: whether brightness rises to the right, in a grid of 8 x 8 (Krawetz 2013, "dHash")."""
    grey = picture.convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.int16)  # (8, 9)
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


def both_ways(picture: Image.Image) -> tuple[int, int]:
    """The hash of a picture as it is, and mirrored."""
    return difference_hash(picture), difference_hash(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def groups(hashes: Hashes, distance: int = DISTANCE) -> NDArray[np.int64]:
    """The group of each row, (rows,): rows alike, also through others between them, are in one.

    Bits are cut into distance + 1 bands: hashes that differ in no more bits than `distance` agree in one band at least,
    so only rows with a band in common are compared.

    Args:
        hashes: (rows, 2), of each row `both_ways`.
    """
    parent = np.arange(len(hashes))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    unique, inverse = np.unique(hashes.T.ravel(), return_inverse=True)  # every row first, then every row mirrored
    owners = np.arange(2 * len(hashes)) % max(len(hashes), 1)
    first = np.full(len(unique), -1)
    for place, owner in zip(inverse.tolist(), owners.tolist(), strict=True):
        if first[place] < 0:
            first[place] = owner
        parent[root(owner)] = root(int(first[place]))
    for one, other in _close_pairs(unique, distance):
        parent[root(int(first[one]))] = root(int(first[other]))
    return np.array([root(row) for row in range(len(hashes))], dtype=np.int64)


def _close_pairs(hashes: Hashes, distance: int) -> Iterable[tuple[int, int]]:
    """Places of different hashes that differ in at most `distance` bits; a pair may come more than once."""
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for place, one in enumerate(bucket[:-1]):
                others = bucket[place + 1 :]
                near = others[np.bitwise_count(hashes[others] ^ hashes[one]) <= distance]
                yield from ((int(one), int(other)) for other in near)
