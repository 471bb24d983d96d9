"""Where the curves of a run go: accelerate's trackers, started so that event files lie in the version folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen_image_finetune.config import Config

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

STEPS_PER_HISTOGRAM = 50


class Trackers:
    """All trackers of a run; silent where there are none."""

    def __init__(self, config: Config, run: Path, resumed_at: int | None = None) -> None:
        from accelerate import tracking

        project, version = config.logging.tracker_project_name, run.name
        local = run / config.logging.logging_dir
        self._trackers: list[Any] = []
        self._collected: list[Tensor] = []
        self._writer: Any = None  # of TensorBoard, which alone takes histograms and text
        for name in config.logging.trackers:
            if name == "tensorboard":
                # Points of an interrupted run behind the checkpoint would be drawn twice: purge them.
                tracker = tracking.TensorBoardTracker(run.name, str(run.parent), purge_step=resumed_at)
                self._writer = tracker.writer
            else:
                local.mkdir(parents=True, exist_ok=True)
                if name == "wandb":
                    tracker = tracking.WandBTracker(project, name=version, dir=str(local))
                elif name == "swanlab":
                    tracker = tracking.SwanLabTracker(project, experiment_name=version, logdir=str(local))
                else:
                    tracker = tracking.TrackioTracker(project, name=version)
                tracker.store_init_configuration(config.model_dump(mode="json"))
            self._trackers.append(tracker)
        if self._writer is not None:
            self._writer.add_text("config", f"```yaml\n{config.to_yaml()}\n```", resumed_at or 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
            else:
                tracker.log(dict(values), step=step)

    def collect(self, name: str, values: Sequence[Tensor], step: int) -> None:
        """Gather values for a histogram, drawn every `STEPS_PER_HISTOGRAM` steps."""
        if self._writer is None:
            return
        self._collected.extend(values)
        if step % STEPS_PER_HISTOGRAM == 0:
            self._writer.add_histogram(name, torch.cat(self._collected), step)
            self._collected.clear()

    def pictures(self, name: str, pictures: Sequence[Image], step: int) -> None:
        import numpy as np

        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                for place, picture in enumerate(pictures):
                    self._writer.add_image(f"{name}/{place}", np.asarray(picture), step, dataformats="HWC")
            elif tracker.name in ("wandb", "trackio"):
                tracker.log_images({name: list(pictures)}, step=step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def unavailable(names: Sequence[str]) -> list[str]:
    """The trackers whose package is not installed."""
    from importlib.util import find_spec

    return [name for name in names if find_spec(name) is None]
