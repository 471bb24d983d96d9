"""A run as it goes on: what the files in its folder say, read piece by piece."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from qwen_image_finetune.data.images import DataError, open_upright
from qwen_image_finetune.data.sources import read_folder
from qwen_image_finetune.disk import history, runs, versions
from qwen_image_finetune.disk.reading import Unreadable
from qwen_image_finetune.disk.versions import RunError
from qwen_image_finetune.judging.pages.reading import flat
from qwen_image_finetune.studio.jobs import Job, end_of
from qwen_image_finetune.studio.shelf import Refused, Shelf

TAIL = 16_384  # bytes at the end of the metrics that a short look reads
MOST_LINES = 3_000  # of the metrics that are sent at once; where there are more, every second, third, ...
RECENT = 50  # steps whose median says how long one takes
LARGEST_CONFIGURATION, LARGEST_DATA = 1_000_000, 50_000_000  # bytes of files of a run that are read


@dataclass(frozen=True)
class Brief:
    """A run in a line."""

    name: str
    state: str
    step: int
    total: int | None  # optimizer steps at its end; None where that is not known
    loss: float | None
    seconds_left: float | None  # where it runs
    model: str
    sample_step: int | None  # of the newest samples
    changed: float  # seconds since 1970

    @property
    def title(self) -> str:
        """Project and version."""
        return "/".join(self.name.split("/")[-2:])


class Runs:
    """The runs of a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._settings: dict[str, tuple[int, dict[str, Any]]] = {}
        self._briefs: dict[str, tuple[tuple[int, ...], Brief]] = {}

    def newest(self, names: Sequence[str]) -> list[str]:
        """Names of runs, what was written last first."""
        return sorted(names, key=lambda name: _changed(self.shelf.root / name), reverse=True)

    def file(self, name: str, inner: str) -> Path | None:
        """A file of a run; None where it is not there."""
        path = self.shelf.inside(f"{name}/{inner}")
        return path if path.is_file() else None

    def settings(self, name: str) -> dict[str, Any]:
        """Its configuration by dotted keys; empty until it has begun to train."""
        path = self.file(name, "config.yaml")
        if path is None or path.stat().st_size > LARGEST_CONFIGURATION:
            return {}
        stamp = path.stat().st_mtime_ns
        known = self._settings.get(name)
        if known is None or known[0] != stamp:
            try:
                tree = _Loader(path.read_text(encoding="utf-8", errors="replace")).get_single_data()
            except yaml.YAMLError:
                tree = None
            known = (stamp, flat(tree) if isinstance(tree, dict) else {})
            self._settings[name] = known
        return known[1]

    def brief(self, name: str) -> Brief:
        """A run in a line; read anew where its files have changed."""
        path = self.shelf.run(name)
        try:
            state = runs.outcome(path)
        except (RunError, Unreadable):
            state = "damaged"
        stamp = tuple(_changed(path / each) for each in ("", history.METRICS, history.STATE, "samples", "config.yaml"))
        known = self._briefs.get(name)
        if known is None or known[0] != stamp or known[1].state != state:
            try:
                known = (stamp, self._read(name, path, state))
            except (RunError, Unreadable):  # one damaged run does not hide the others; its own page says what it is
                known = (stamp, Brief(name, "damaged", 0, None, None, None, "", None, 0))
            self._briefs[name] = known
        return known[1]

    def _read(self, name: str, path: Path, state: str) -> Brief:
        settings, metrics = self.settings(name), self.file(name, history.METRICS)
        lines = [] if metrics is None else list(tail(metrics))
        step = int(lines[-1]["step"]) if lines else 0
        losses = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
        total = self.total(name)
        drawn = self.sample_steps(name)
        return Brief(
            name, state, step, total, losses[-1] if losses else None,
            seconds_left(lines, total) if state == "running" else None,
            str(settings.get("model.pretrained_model_name_or_path", "")),
            drawn[-1] if drawn else None, _changed(path / history.METRICS) / 1e9,
        )  # fmt: skip

    def evaluation(self, name: str) -> dict[str, Any]:
        """What was measured of it; empty where nothing was."""
        path = self.file(name, "evaluation/evaluation.json")
        return {} if path is None else json.loads(path.read_text(encoding="utf-8"))

    def total(self, name: str) -> int | None:
        """Optimizer steps at its end, by its configuration; None where that depends on its data."""
        settings = self.settings(name)
        steps, epochs = settings.get("train.max_train_steps"), settings.get("train.num_epochs")
        if isinstance(steps, int) and epochs is None:
            return steps
        return 1000 if settings and steps is None and epochs is None else None

    def sample_steps(self, name: str) -> list[int]:
        """Steps at which samples were drawn."""
        folder = self.shelf.inside(f"{name}/samples")
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(found[1]) for each in names if (found := runs.DRAWN.match(each)))

    def layout(self, name: str, step: int) -> list[dict[str, Any]]:
        """What is on the strips of a step: key, prompt, and parts with name, left and width."""
        path = self.file(name, f"samples/step-{step}/layout.json")
        return [] if path is None else json.loads(path.read_text(encoding="utf-8"))

    def sample(self, name: str, step: int, place: int, part: int) -> Image.Image:
        """One picture of a strip.

        Raises:
            Refused: there is no such sample.
        """
        path = self.file(name, f"samples/step-{step}/{place}.png")
        layout = self.layout(name, step)
        if path is None or place >= len(layout) or part >= len(layout[place]["parts"]):
            raise Refused("there is no such sample", 404)
        where = layout[place]["parts"][part]
        try:
            strip = open_upright(path)
        except DataError as error:
            raise Refused(str(error)) from error
        return strip.crop((where["left"], 0, where["left"] + where["width"], strip.height))

    def checkpoints(self, name: str) -> list[dict[str, Any]]:
        """Saved versions of what it has learnt, by step, with the size of their weights in MiB."""
        path = self.shelf.run(name)
        best = history.best_checkpoint(path)
        found = []
        for folder in versions.checkpoint_folders(path):
            weights = self.file(name, f"{folder.name}/{versions.LORA_WEIGHTS}")
            size = None if weights is None else round(weights.stat().st_size / 2**20, 1)
            found.append(
                {"name": folder.name, "step": versions.step_of(folder), "mib": size, "best": best is not None
                 and best.name == folder.name}
            )  # fmt: skip
        return found

    def live(self, name: str, offset: int) -> dict[str, Any]:
        """How a run stands, and the metrics from `offset` bytes on."""
        path = self.shelf.run(name)
        lines, end, again = self.lines(name, offset)
        metrics = self.file(name, history.METRICS)
        recent = [] if metrics is None else list(tail(metrics))
        state, total = runs.outcome(path), self.total(name)
        steps = self.sample_steps(name)
        return {
            "state": state,
            "step": int(recent[-1]["step"]) if recent else 0,
            "total": total,
            "seconds_left": seconds_left(recent, total) if state == "running" else None,
            "seconds_a_step": step_seconds(recent),
            "lines": lines,
            "offset": end,
            "again": again,
            "samples": {"steps": steps, "strips": self.layout(name, steps[-1]) if steps else []},
            "checkpoints": self.checkpoints(name),
        }

    def lines(self, name: str, offset: int) -> tuple[list[dict[str, Any]], int, bool]:
        """(metrics from `offset` on, where they end, whether they begin anew: a resumed run drops some)."""
        path = self.file(name, history.METRICS)
        if path is None:
            return [], 0, offset > 0
        size = path.stat().st_size
        again = offset > size
        with open(path, "rb") as file:
            file.seek(0 if again else offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        found = list(_parsed(whole))
        stride = -(-len(found) // MOST_LINES)
        kept = [line for place, line in enumerate(found) if place % max(stride, 1) == 0 or "loss" not in line]
        return kept, (0 if again else offset) + len(whole), again

    def log(self, name: str) -> str:
        """The end of what it has said."""
        path = self.file(name, history.LOG)
        return "" if path is None else end_of(path)

    def held_out(self, name: str) -> set[str]:
        """Keys of the pairs that it has kept aside of its data set."""
        path = self.file(name, history.DATA)
        if path is None or path.stat().st_size > LARGEST_DATA:
            return set()
        found = json.loads(path.read_text(encoding="utf-8")).get("held_out")
        return set(found) if isinstance(found, dict) else set()

    def pairs(self, name: str) -> int | None:
        """How many pairs it learns from; None where they are not in this folder."""
        paths = self.settings(name).get("data.init_args.dataset_path", [])
        count = 0
        for each in [paths] if isinstance(paths, str) else paths:
            try:
                path = each["path"] if isinstance(each, dict) else str(each)
                count += len(read_folder(self.shelf.folder(path), masks=False)[0])
            except Refused:
                return None
        return count

    def of_job(self, job: Job) -> str | None:
        """The run that a job has begun: the one that its process owns, or owned."""
        noted = job.folder / "run"
        if noted.is_file():
            name = noted.read_text(encoding="utf-8")
            return name if (self.shelf.root / name).is_dir() else None
        project, process = job.about.get("project"), job.process
        if project is None or process is None:
            return None
        try:
            folder = self.shelf.inside(project)
        except Refused:  # hidden: it runs, and is not shown
            return None
        for path in folder.iterdir() if folder.is_dir() else ():
            lock = path / runs.LOCK
            if versions.VERSION.match(path.name) and lock.is_file():
                owner = lock.read_text(encoding="utf-8", errors="replace")
                if owner.startswith(f"process {process} ") and lock.stat().st_mtime >= (job.started or 0) - 1:
                    noted.write_text(self.shelf.name(path), encoding="utf-8")
                    return self.shelf.name(path)
        return None


def tail(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines at the end of a file of metrics."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(size - TAIL, 0))
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return _parsed(whole if size <= TAIL else whole[whole.find(b"\n") + 1 :])


def step_seconds(lines: list[dict[str, Any]]) -> float | None:
    """The median of the last steps."""
    seconds = [line["step_seconds"] for line in lines[-RECENT:] if isinstance(line.get("step_seconds"), float)]
    return statistics.median(seconds) if seconds else None


def seconds_left(lines: list[dict[str, Any]], total: int | None) -> float | None:
    """Until the last step, at the pace of the last ones."""
    pace = step_seconds(lines)
    return None if pace is None or total is None else pace * max(total - int(lines[-1]["step"]), 0)


def _parsed(content: bytes) -> Iterator[dict[str, Any]]:
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield {name: value for name, value in line.items() if isinstance(value, int | float) and _finite(value)}


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _changed(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except FileNotFoundError:
        return 0


_Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
