"""Trackers that draw their own pages: Weights & Biases, SwanLab, Trackio and MLflow, each behind one interface.

accelerate starts and ends them and logs their curves; how each takes a picture with its caption or a table is here.
"""

from __future__ import annotations

import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qwen_image_finetune.config import Config

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; None where there is no value."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]


class Online(ABC):
    """A run at a tracker."""

    def __init__(self, tracker: Any) -> None:
        """
        Args:
            tracker: accelerate's, which is started.
        """
        self.tracker = tracker
        tracker.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of the curve of each name, at an optimizer step."""
        self.tracker.log(dict(values), step=step)

    @abstractmethod
    def picture(self, name: str, picture: Image, caption: str, step: int) -> None:
        """An RGB picture of an optimizer step."""

    @abstractmethod
    def table(self, name: str, table: Table, step: int) -> None:
        """A table of an optimizer step."""

    def close(self) -> None:
        """Write what is left."""
        self.tracker.finish()


class WeightsAndBiases(Online):
    """Keeps its files in `local`; WANDB_MODE=offline sends nothing."""

    def __init__(self, config: Config, version: str, local: Path) -> None:
        from accelerate.tracking import WandBTracker

        project, settings = config.logging.tracker_project_name, config.model_dump(mode="json")
        super().__init__(WandBTracker(project, name=version, dir=str(local), config=settings))

    def picture(self, name: str, picture: Image, caption: str, step: int) -> None:
        import wandb

        self.tracker.log({name: wandb.Image(picture, caption=caption)}, step=step)

    def table(self, name: str, table: Table, step: int) -> None:
        import wandb

        rows = [list(row) for row in table.rows]
        self.tracker.log({name: wandb.Table(columns=list(table.columns), data=rows)}, step=step)


class SwanLab(Online):
    """Keeps its files in `local`; SWANLAB_MODE=offline sends nothing."""

    def __init__(self, config: Config, version: str, local: Path) -> None:
        from accelerate.tracking import SwanLabTracker

        project, settings = config.logging.tracker_project_name, config.model_dump(mode="json")
        super().__init__(SwanLabTracker(project, experiment_name=version, logdir=str(local), config=settings))

    def picture(self, name: str, picture: Image, caption: str, step: int) -> None:
        import swanlab

        self.tracker.log({name: swanlab.Image(picture, caption=caption)}, step=step)

    def table(self, name: str, table: Table, step: int) -> None:
        import swanlab

        drawn = swanlab.echarts.Table().add(list(table.columns), [list(row) for row in table.rows])
        self.tracker.log({name: drawn}, step=step)


class Trackio(Online):
    """Keeps its files in a folder of the machine, TRACKIO_DIR, where `trackio show` finds the runs of all projects."""

    def __init__(self, config: Config, version: str, local: Path) -> None:
        from accelerate.tracking import TrackioTracker

        super().__init__(TrackioTracker(config.logging.tracker_project_name, name=version, config=flat(config)))

    def picture(self, name: str, picture: Image, caption: str, step: int) -> None:
        import trackio

        self.tracker.log({name: trackio.Image(picture, caption=caption)}, step=step)

    def table(self, name: str, table: Table, step: int) -> None:
        import trackio

        rows = [list(row) for row in table.rows]
        self.tracker.log({name: trackio.Table(columns=list(table.columns), data=rows)}, step=step)


class MLflow(Online):
    """Sends to MLFLOW_TRACKING_URI; where nobody set one, it keeps a database and its artifacts in `local`."""

    opened: ClassVar[set[Path]] = set()  # databases of this process

    def __init__(self, config: Config, version: str, local: Path) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        self.tables: dict[str, list[list[Any]]] = {}  # all rows so far
        self.ours = not mlflow.is_tracking_uri_set()
        if self.ours:
            mlflow.set_tracking_uri(f"sqlite:///{self._database(local.absolute())}")
        # A server says itself where the artifacts of an experiment go.
        artifacts = (local / "mlartifacts").absolute().as_uri() if self.ours else None
        super().__init__(MLflowTracker(config.logging.tracker_project_name, artifacts, run_name=version))
        self.tracker.store_init_configuration(flat(config))

    def picture(self, name: str, picture: Image, caption: str, step: int) -> None:
        import mlflow

        mlflow.log_image(picture, key=name, step=step, synchronous=True)
        # Its pictures have no captions.
        self.table("captions", Table(("picture", "caption"), [(name, caption)]), step)

    def table(self, name: str, table: Table, step: int) -> None:
        import mlflow

        columns, rows = ["step", *table.columns], self.tables.setdefault(name, [])
        new, file = not rows, f"{name}.json"
        rows.extend([step, *row] for row in table.rows)
        if new:  # lists the file among the run's tables
            mlflow.log_table({column: [row[place] for row in rows] for place, column in enumerate(columns)}, file)
        # A table of theirs that is added to is read again, and a pair called 007 comes back as the number 7.
        mlflow.log_dict({"columns": columns, "data": rows}, file)

    def _database(self, folder: Path) -> Path:
        """`mlflow.db`, or the next name: mlflow holds on to a database that went with a version which made way."""
        names = (folder / f"mlflow{number or ''}.db" for number in itertools.count())
        file = next(name for name in names if name.exists() or name not in self.opened)
        self.opened.add(file)
        return file

    def close(self) -> None:
        import mlflow

        super().close()
        if self.ours:  # the next run of this process has a database of its own
            mlflow.set_tracking_uri(None)


TRACKERS: dict[str, type[Online]] = {
    "wandb": WeightsAndBiases,
    "swanlab": SwanLab,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def open_tracker(name: str, config: Config, version: str, local: Path) -> Online:
    """Start a run at a tracker, with its configuration.

    Args:
        version: name of the run.
        local: folder for files of the tracker.
    """
    tracker: Any = TRACKERS[name]
    opened: Online = tracker(config, version, local)
    return opened


def unavailable(names: Sequence[str]) -> list[str]:
    """The trackers whose package is not installed."""
    from importlib.util import find_spec

    # mlflow-skinny has no tables, and no database to keep them in.
    parts = {"mlflow": ("mlflow", "pandas") + (() if "MLFLOW_TRACKING_URI" in os.environ else ("sqlalchemy",))}
    return [name for name in names if any(find_spec(part) is None for part in parts.get(name, (name,)))]


def flat(config: Config) -> dict[str, Any]:
    """The configuration as `section.key: value`, for trackers that take no sections."""
    found: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value and all(key.isidentifier() for key in value):
            for key, part in value.items():
                add(f"{prefix}.{key}" if prefix else key, part)
        else:
            found[prefix] = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value

    add("", config.model_dump(mode="json"))
    return found
