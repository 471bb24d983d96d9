"""Prompts of one's own, with or without references, as a data set: what they ask for is drawn, and nobody knows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.geometry import Scaled, Size
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.data.sources import shared_of

if TYPE_CHECKING:
    from qwen_image_finetune.config import DatasetArguments, SampleConfig
    from qwen_image_finetune.data.dataset import _Checked


class AskedDataset(ImageDataset):
    """Rows of `validation.samples`. The target of a row only says how large a picture is drawn.

    It is the reference that the family takes the size from, as in prediction; without references, a picture that is
    trained on.
    """

    def __init__(
        self,
        samples: Sequence[SampleConfig],
        stand_in: Path,
        sizing: int,
        arguments: DatasetArguments,
        size: Size,
        side_multiple: int,
        max_references: int,
        scaled: Scaled,
    ) -> None:
        """
        Args:
            stand_in: picture whose size those without a reference get.
            sizing: `Family.sizing_reference`; the others are those of `ImageDataset`.
        """
        self._samples, self._stand_in, self._sizing = samples, stand_in, sizing
        # Shown whole and as they are, like the references of a prediction.
        plain = {
            "use_edit_mask": False, "center_crop": False, "random_crop": False, "random_flip": False,
            "max_buckets": None,
        }  # fmt: skip
        super().__init__(arguments.model_copy(update=plain), size, side_multiple, max_references, scaled=scaled)
        self.notes = []  # the pairs have said it

    def _list(self, arguments: DatasetArguments) -> list[Row]:
        shared = shared_of(arguments.model_copy(update={"dataset_path": str(Path.cwd())}), 0)  # the sizes of all sets
        rows = []
        for place, sample in enumerate(self._samples):
            references = tuple(str(path) for path in sample.paths)
            target = references[self._sizing] if references else str(self._stand_in)
            key = f"validation.samples[{place}]"
            rows.append(Row(key, Path.cwd(), target, references, None, sample.prompt, None, shared=shared))
        return rows

    def _note_checked(self, checked: dict[int, _Checked], everything: bool) -> None:
        """Target and reference are the same picture here: no remark on pairs applies."""
