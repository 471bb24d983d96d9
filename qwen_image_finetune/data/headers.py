"""The sizes of all pictures of a data set, from the headers of their files, each of which is read once."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from qwen_image_finetune.data.images import DataError, size_upright
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.records import Extent


class Headers:
    """Upright sizes of the files of some rows, read when they are asked for.

    Attributes:
        extents: (files, 2) uint32, width and height of every file, row after row as `files_of` has them; 0 where not
            yet read.
        first: (rows + 1,) int64, the place of each row's target in it.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        counts = [1 + len(row.reference_names) + (row.mask_name is not None) for row in rows]
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.extents = np.zeros((int(self.first[-1]), 2), dtype=np.uint32)

    def of(self, index: int) -> list[Extent]:
        """Of target, references and mask of a row.

        Raises:
            DataError: headers that cannot be read, all of the row.
        """
        row, first, end = self._rows[index], self.first[index], self.first[index + 1]
        extents = self.extents[first:end]
        if not extents.all():
            problems: list[str] = []
            for place, path in enumerate(files_of(row)):
                try:
                    extents[place] = size_upright(path)
                except DataError as error:
                    problems += error.problems
            if problems:
                raise DataError(problems)
        return [(width, height) for width, height in extents.tolist()]

    def of_target(self, index: int) -> Extent:
        """The first of them; raises DataError as `of`."""
        return self.of(index)[0]


def files_of(row: Row) -> list[str]:
    """Files of target, references and mask; as texts, which cost a tenth of paths."""
    names = (row.target_name, *row.reference_names, *(() if row.mask_name is None else (row.mask_name,)))
    return [os.path.join(row.folder, name) for name in names]
