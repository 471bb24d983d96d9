"""Rows whose inputs look alike, found by a perceptual hash, so that a held-out picture was never trained on."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.images import open_upright
from qwen_image_finetune.data.listing import Row

Hashes = NDArray[np.uint64]

# Bits, of 64, in which near-duplicates may differ. Measured on the forty portraits of data/ and four photographs:
# copies at half the size, as JPEG of quality 40, 15 % brighter or of 20 % less contrast differ in 6 at most, different
# pictures in 10 at least. A crop of 2 % at each side differs in up to 9 and may pass; one of 5 % mostly does.
DISTANCE = 6


def input_of(row: Row) -> str:
    """The file that tells rows apart: the first reference, or the target where a row has none.

    Not the target where there is a reference: masks and outlines of different pictures look alike.
    """
    return str(row.references[0] if row.reference_names else row.target)


def difference_hash(picture: Image.Image) -> int:
    """64 bits: whether brightness rises to the right, in a grid of 8 x 8 (Krawetz 2013, "dHash")."""
    grey = picture.convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.int16)  # (8, 9)
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


def input_hashes(dataset: ImageDataset) -> Hashes:
    """Hashes of every row's input, (rows, 2): as it is, and mirrored.

    Raises:
        DataError: a picture cannot be read.
    """

    def both(row: Row) -> tuple[int, int]:
        picture = open_upright(input_of(row))
        return difference_hash(picture), difference_hash(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return np.array(list(pool.map(both, dataset.rows)), dtype=np.uint64).reshape(-1, 2)


def groups(hashes: Hashes, distance: int = DISTANCE) -> NDArray[np.int64]:
    """The group of each row, (rows,): rows alike, also through others between them, are in one.

    Bits are cut into distance + 1 bands: hashes that differ in no more bits than `distance` agree in one band at least,
    so only rows with a band in common are compared.

    Args:
        hashes: (rows, 2), as `input_hashes` gives them.
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


def choose(dataset: ImageDataset, share: float) -> list[int]:
    """Rows to hold out, in order: `share` of them, whole groups, by the content of their inputs alone.

    Names, order and number of processes do not matter. As many groups are taken, in the order of their content
    hashes, as fit; at least one row is held out and at least one is left.

    Raises:
        ValueError: rows are so alike that no group can be held out.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups(input_hashes(dataset)).tolist()):
        members.setdefault(group, []).append(row)
    wanted = min(max(round(share * len(dataset)), 1), len(dataset) - 1)
    chosen: list[int] = []
    for _, rows in sorted((_content(dataset.rows, rows), rows) for rows in members.values()):
        if len(chosen) + len(rows) <= wanted:
            chosen += rows
    if not chosen:
        raise ValueError(
            f"{wanted} of {len(dataset)} rows should be held out, but the smallest group of rows with inputs that look "
            f"alike has {min(map(len, members.values()))}: give validation.dataset_path, or a larger validation.share"
        )
    return sorted(chosen)


def _content(rows: Sequence[Row], group: Sequence[int]) -> str:
    """The least hash of a group's files: it stays when a copy joins, unless the copy happens to have a lesser one."""
    digests = []
    for row in group:
        with open(input_of(rows[row]), "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return min(digests)


def leaking(held_out: ImageDataset, training: ImageDataset) -> list[int]:
    """Rows of `held_out` whose input looks like one of `training`."""
    ours, theirs = input_hashes(held_out), input_hashes(training)
    labels = groups(np.concatenate([ours, theirs]))
    trained = set(labels[len(ours) :].tolist())
    return [row for row, label in enumerate(labels[: len(ours)].tolist()) if label in trained]
