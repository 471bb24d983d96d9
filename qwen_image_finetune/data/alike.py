"""Rows whose inputs look alike, found by a perceptual hash, so that a held-out picture was never trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen_image_finetune.data import shards
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.hashes import Hashes, both_ways, groups
from qwen_image_finetune.data.images import open_upright
from qwen_image_finetune.data.listing import Row


def input_of(row: Row) -> str:
    """The file that tells rows apart: the first reference, or the target where a row has none.

    Not the target where there is a reference: masks and outlines of different pictures look alike.
    """
    return str(row.references[0] if row.reference_names else row.target)


def input_hashes(dataset: ImageDataset) -> Hashes:
    """Hashes of every row's input, (rows, 2): as it is, and mirrored.

    Raises:
        DataError: a picture cannot be read.
    """

    def both(row: Row) -> tuple[int, int]:
        return both_ways(open_upright(input_of(row)))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return np.array(list(pool.map(both, dataset.rows)), dtype=np.uint64).reshape(-1, 2)


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
    return min(shards.digest(input_of(rows[row])) for row in group)


def leaking(held_out: ImageDataset, training: ImageDataset) -> list[int]:
    """Rows of `held_out` whose input looks like one of `training`."""
    ours, theirs = input_hashes(held_out), input_hashes(training)
    labels = groups(np.concatenate([ours, theirs]))
    trained = set(labels[len(ours) :].tolist())
    return [row for row, label in enumerate(labels[: len(ours)].tolist()) if label in trained]
