"""Where the curves, samples and tables of a run go: TensorBoard files in the version folder, and online trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_finetune.config import Config
from qwen_image_finetune.disk.history import METRICS
from qwen_image_finetune.machine import console
from qwen_image_finetune.training.online import Online, Table, open_tracker

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

STEPS_PER_HISTOGRAM = 50


class Trackers:
    """All trackers of a run; silent where there are none."""

    def __init__(self, config: Config, run: Path, resumed_at: int | None) -> None:
        """
        Args:
            run: the version folder.
            resumed_at: steps that were done before; None for a run from its start.
        """
        local = run / config.logging.logging_dir
        self._online: list[Online] = []
        self._collected: dict[str, list[Tensor]] = {}  # since the last histogram of each name
        self._collected_at = 0  # step of the newest of them
        self._writer: Any = None  # of TensorBoard, which alone takes histograms and text
        for name in config.logging.trackers:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                # Points of an interrupted run behind the checkpoint would be drawn twice: purge them.
                self._writer = SummaryWriter(str(run), purge_step=None if resumed_at is None else resumed_at + 1)
            else:
                local.mkdir(parents=True, exist_ok=True)
                self._online.append(open_tracker(name, config, run.name, local))
        if self._writer is not None:
            self._writer.add_text("config", f"```yaml\n{config.to_yaml()}\n```", resumed_at or 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of the curve of each name, at an optimizer step."""
        if self._writer is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # One event for all curves; `add_scalar` for each costs a fifth of a millisecond apiece.
            points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._writer.file_writer.add_summary(Summary(value=points), step)
        for tracker in self._online:
            tracker.scalars(values, step)

    def collect(self, name: str, values: Sequence[Tensor], step: int) -> None:
        """Gather values for a histogram, drawn every `STEPS_PER_HISTOGRAM` steps and at the end."""
        if self._writer is None:
            return
        self._collected.setdefault(name, []).extend(values)
        self._collected_at = step
        if step % STEPS_PER_HISTOGRAM == 0:
            self._draw_histograms()

    def _draw_histograms(self) -> None:
        import torch

        for name, values in self._collected.items():
            self._writer.add_histogram(name, torch.cat(values), self._collected_at)
        self._collected.clear()

    def pictures(self, name: str, pictures: Sequence[Image], captions: Sequence[str], step: int) -> None:
        """RGB pictures of an optimizer step, as NAME/0, NAME/1, ...; TensorBoard shows no captions."""
        import numpy as np

        for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            if self._writer is not None:
                self._writer.add_image(f"{name}/{place}", np.asarray(picture), step, dataformats="HWC")
            for tracker in self._online:
                tracker.picture(f"{name}/{place}", picture, caption, step)

    def table(self, name: str, table: Table, step: int) -> None:
        """A table of an optimizer step, for the online trackers; one without rows is left out."""
        for tracker in self._online if table.rows else ():
            tracker.table(name, table, step)

    def close(self) -> None:
        """End the files. Never fails a run that is saved: what a full disk took from the curves is said."""
        try:
            self._close()
        except OSError as error:
            console.say(f"the last points of the curves could not be written ({error}); {METRICS} has every step")

    def _close(self) -> None:
        if self._writer is not None:
            self._draw_histograms()
            self._writer.close()
        for tracker in self._online:
            tracker.close()
