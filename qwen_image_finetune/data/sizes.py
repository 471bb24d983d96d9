"""At which sizes the rows of a data set are seen: fixed ones, areas in turn, and a bounded number of shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from qwen_image_finetune.data import buckets, told
from qwen_image_finetune.data.geometry import Crop, Size, drawn, final_size
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.records import Extent


class Sizes:
    """What the settings of a data set, and the shapes of all its pictures, say of a single one."""

    def __init__(
        self,
        rows: Sequence[Row],
        size: Size,
        side_multiple: int,
        seed: int,
        crop: Crop,
        most: int | None,
        extent_of: Callable[[int], Extent],
    ) -> None:
        """
        Args:
            size: `Family.size`.
            seed: of which area comes first.
            most: `max_buckets`.
            extent_of: upright size of the target of the row of a number; raises DataError.
        """
        self._rows, self._size, self._multiple, self._seed, self._crop = rows, size, side_multiple, seed, crop
        self._most, self._extent_of = most, extent_of
        self._kept: dict[int | None, list[Extent]] = {}  # sizes that others are brought to, by their area

    def of(self, row: Row, visit: int | None) -> tuple[Extent | None, int | None]:
        """(size of its target or None, pixel area of pictures that keep their aspect ratio or None) at a visit.

        Args:
            visit: as that of `ImageDataset.plan`.
        """
        shared = row.shared
        if shared.image_size is not None:
            width, height = rounded(shared.image_size, self._multiple)
            return (width, height), width * height
        if not shared.areas:
            return None, None
        turns = len(shared.areas)
        turn = 0 if visit is None else (drawn("size", self._seed, row.key, 0, turns) + visit) % turns
        return None, shared.areas[turn]

    def snap(self, area: int | None) -> Callable[[Extent], Extent] | None:
        """What brings a size of an area to one that is kept; None where all are."""
        return None if self._most is None else partial(self._nearest, area)

    def settle(self) -> None:
        """Find the sizes that are kept now, once, instead of in every thread that asks for one."""
        if self._most is not None:
            for area in {
                area for row in self._rows if not row.shared.image_size for area in row.shared.areas or (None,)
            }:
                self._buckets(area)

    def notes(self) -> Iterator[str]:
        """What the sizes that are kept cost."""
        for area, kept in self._kept.items():
            yield told.about_buckets(self._own(area), kept, area)

    def _nearest(self, area: int | None, size: Extent) -> Extent:
        return buckets.nearest(size, self._buckets(area))

    def _buckets(self, area: int | None) -> list[Extent]:
        if area not in self._kept:
            assert self._most is not None
            self._kept[area] = buckets.chosen(self._own(area), self._most)
        return self._kept[area]

    def _own(self, area: int | None) -> Counter[Extent]:
        """How many targets have which size at an area, where their shape is kept. Bad headers are left to the check."""
        found: Counter[Extent] = Counter()
        for index, row in enumerate(self._rows):
            if row.shared.image_size is None and area in (row.shared.areas or (None,)):
                with suppress(DataError):
                    nominal = self._crop.nominal(self._extent_of(index), None)
                    found[final_size(self._size, nominal, area, len(row.reference_names))] += 1
        return found


def rounded(image_size: Extent, side_multiple: int) -> Extent:
    """The largest size below one that a model takes; sides may be 0."""
    width, height = (side // side_multiple * side_multiple for side in image_size)
    return width, height


def fixed_notes(rows: Sequence[Row], side_multiple: int) -> Iterator[str]:
    """Which fixed sizes are rounded.

    Raises:
        DataError: for one that the model cannot take.
    """
    for given in dict.fromkeys(row.shared.image_size for row in rows if row.shared.image_size is not None):
        words, final = f"data.init_args.image_size={list(given)}", rounded(given, side_multiple)
        why = f"this model takes sides that are multiples of {side_multiple}"
        if not all(final):
            raise DataError(f"{words}: {why}; give at least that")
        if final != given:
            yield f"{words} is rounded down to {list(final)}: {why}"
