"""Some rows of a data set, as a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.geometry import Plan
from qwen_image_finetune.records import Example, Extent


class Part(ImageDataset):
    """The chosen rows of another data set, which does the work: so it may be of a class of the user's own."""

    def __init__(self, whole: ImageDataset, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)
        self.resampling, self.left_out = whole.resampling, whole.left_out
        self.notes = []  # the whole has said what it knew; more comes of a check
        self.rows = [whole.rows[index] for index in self.indices]

    def check(
        self,
        decode: bool = False,
        progress: Callable[[int, int], None] | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[str]:
        chosen = self.indices if rows is None else [self.indices[row] for row in rows]
        said = len(self.whole.notes)
        problems = self.whole.check(decode, progress, chosen)
        self.notes += self.whole.notes[said:]
        return problems

    def plan(self, index: int, visit: int | None = None) -> Plan:
        return self.whole.plan(self.indices[index], visit)

    def geometry(self, index: int, visit: int | None = None) -> tuple[Extent, ...]:
        return self.whole.geometry(self.indices[index], visit)

    def turns(self, index: int) -> int:
        return self.whole.turns(self.indices[index])

    def scaled(self, picture: Extent, size: Extent, references: int, area: int | None) -> Extent:
        return self.whole.scaled(picture, size, references, area)

    def prompt(self, index: int) -> str:
        return self.whole.prompt(self.indices[index])

    def prompts(self, index: int) -> tuple[str, ...]:
        return self.whole.prompts(self.indices[index])

    def wording(self, index: int, visit: int | None, number: int) -> int:
        return self.whole.wording(self.indices[index], visit, number)

    def load(self, index: int, visit: int | None = None) -> Example:
        return self.whole.load(self.indices[index], visit)


def spread(number: int, total: int) -> list[int]:
    """`number` places (or all, if there are fewer) spread evenly over `total`, first and last included."""
    number = min(number, total)
    return [round(place * (total - 1) / max(number - 1, 1)) for place in range(number)]
