"""What each setting does to held-out quality at the same steps, measured on both toy bases.

    python scripts/quality.py                      # goes on where the last call ended
    python scripts/quality.py --minutes 30         # no run begins after so many
    python scripts/quality.py --rows DoRA OFT      # these alone
    python scripts/quality.py --page               # only write the pages from what is known

Every row differs from the first one, which is what `qif init` writes for these bases with four pairs a step, in what it
names. Rows of one seed see the same pairs in the same order with the same noise. Each run is measured at `MARKS`, from
its checkpoints, by one measure for all. It is kept in docs/quality.json as soon as it is known; docs/defaults.md and
docs/adapters.md have tables written from that. The rate stays as it is all the way, so that a run of 400 steps is the
first half of one of 800, and goes on from its last checkpoint, in build/quality.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import quality_page
from quality_rows import BASES, ROWS, Row

from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.disk import versions
from qwen_image_finetune.disk.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / "docs" / "quality.json"
WORK = ROOT / "build" / "quality"  # runs and caches
SEEDS = (42, 43, 44)
MARKS = (50, 100, 200, 300, 400, 600, 800)  # steps after which a run is measured
LADDER = (200, 400, 800)  # lengths that runs are brought to, one after the other
DRAWING_STEPS = 4  # as good as 8 and 28 for these masks (toy/README.md)
LEVELS = 4  # noise levels of each held-out pair's loss
OURS = (
    "data.init_args.random_crop=false", "data.init_args.random_flip=false", "data.init_args.crop_scale=[1.0, 1.0]",
    "cache.num_variations=1", "train.sigma_shift=model", "model.lora.init_lora_weights=true",
    "lr_scheduler={scheduler_type: constant}",
)  # fmt: skip
Task = tuple[str, Row, int, int]  # base, row, seed, steps to bring it to


class Study:
    """What is known, and the file that it is kept in."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.written: dict[str, Any] = {"before": {}, "runs": {}}
        if file.is_file():
            self.written = json.loads(file.read_text(encoding="utf-8"))

    def marks(self, base: str, row: Row, seed: int) -> dict[str, Any]:
        """Steps and what was measured after them; nothing of a row whose settings were others then."""
        known = self.written["runs"].get(base, {}).get(row.name, {})
        return dict(known["seeds"].get(str(seed), {})) if known.get("settings") == list(row.of(base)) else {}

    def due(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Of the tasks, in order, those that are not done when their turn comes."""
        return (task for task in tasks if str(task[3]) not in self.marks(*task[:3]))

    def note(self, base: str, row: Row, seed: int, step: int, found: dict[str, float]) -> None:
        """Keep what was measured after a step."""
        marks = self.marks(base, row, seed) | {str(step): found}
        runs = self.written["runs"].setdefault(base, {})
        if runs.get(row.name, {}).get("settings") != list(row.of(base)):
            runs[row.name] = {"settings": list(row.of(base)), "seeds": {}}
        runs[row.name]["seeds"][str(seed)] = dict(sorted(marks.items(), key=lambda mark: int(mark[0])))
        self.write()

    def write(self) -> None:
        """Keep what is known."""
        write_atomic(self.file, json.dumps(self.written, indent=1) + "\n")


def tasks(rows: Sequence[Row], bases: Sequence[str], seeds: Sequence[int], steps: int) -> list[Task]:
    """Everything to do, what is most worth knowing first: rows that decide about a default before the others."""
    order: dict[Task, None] = {}
    first, others = seeds[:1], seeds[1:]
    for length, decides, those in (
        (200, True, first), (200, True, others), (200, False, first), (400, True, seeds), (200, False, others),
        (400, False, seeds), (800, True, seeds), (800, False, seeds),
    ):  # fmt: skip
        chosen = [row for row in rows if row.decides == decides and length <= steps]
        order.update({(base, row, seed, length): None for seed in those for row in chosen for base in bases})
    return list(order)


def settings(base: str, row: Row, seed: int, steps: int) -> Config:
    """The configuration of a run."""
    return load_config(ROOT / f"configs/demo_{base}.yaml", [
        *OURS, "validation={}", "logging.report_to=none", f"cache.cache_dir={WORK / 'cache'}",
        f"logging.output_dir={WORK / base / str(seed)}", f"logging.tracker_project_name={row.folder}",
        "train.checkpoints_total_limit=null", f"train.checkpointing_steps={MARKS[0]}", f"train.max_train_steps={steps}",
        f"train.seed={seed}", "train.resume_from_checkpoint=latest", *row.of(base),
    ])  # fmt: skip


class Judge:
    """Draws the held-out faces' masks and measures their loss, for every run of a base alike."""

    def __init__(self, base: str) -> None:
        import torch
        from precision_quality import held_out

        from qwen_image_finetune.command.demo import PROMPT
        from qwen_image_finetune.drawing.build import build_predictor
        from qwen_image_finetune.drawing.predict import Conditions
        from qwen_image_finetune.machine.accelerator import build_accelerator
        from qwen_image_finetune.records import collate

        self.config = settings(base, ROWS[0], 0, LADDER[0])
        self.predictor = build_predictor(self.config)
        self.accelerator = build_accelerator(self.config)
        family, pipe = self.predictor.family, self.predictor.pipe
        faces, self.masks = held_out(self.predictor)
        with torch.no_grad():
            rows = [self.predictor.encode(PROMPT, [face], self.predictor.size(face)) for face in faces]
            self.pairs = [
                replace(row, key=f"face {number}", target=family.encode_image(pipe, mask))
                for number, (row, mask) in enumerate(zip(rows, self.masks, strict=True))
            ]
        self.conditions = Conditions(collate(rows))

    def __call__(self, trained: Path | None) -> dict[str, float]:
        """Mean foreground IoU of the masks, and mean loss of the held-out pairs.

        The loss is the squared error at fixed noise, at `LEVELS` noise levels of the base's own distribution.

        Args:
            trained: a folder with a LoRA, or with a transformer that was tuned as a whole; None is the base alone.
        """
        import torch
        from draw_many import add_lora

        from qwen_image_finetune import loading
        from qwen_image_finetune.drawing.build import load_for_prediction
        from qwen_image_finetune.drawing.predict import Guidance
        from qwen_image_finetune.records import collate
        from qwen_image_finetune.toy.measure import foreground_iou
        from qwen_image_finetune.training.held_out_loss import HeldOutLoss
        from qwen_image_finetune.training.objective import Objective

        predictor, config, family = self.predictor, self.config, self.predictor.family
        tuned = trained is not None and (trained / "transformer").is_dir()
        folder = trained if trained and tuned else loading.checkpoint_folder(config, family)
        predictor.transformer = load_for_prediction(config, family, folder, torch.device("cpu"), tuned)
        if trained and not tuned:
            add_lora(predictor, trained / versions.LORA_WEIGHTS)
        objective = Objective(config, family, predictor.transformer, predictor.scheduler.config, self.accelerator)
        drawn = HeldOutLoss(objective, config.validation.model_copy(update={"num_loss_sigmas": LEVELS}))
        levels, noise = (torch.stack(each) for each in zip(*map(drawn.draw, self.pairs), strict=True))
        batch = collate(self.pairs)
        losses = [objective.loss(predictor.transformer, batch, levels[:, one], noise[:, one]) for one in range(LEVELS)]

        embedded = 1.0 if family.distilled_guidance(predictor.transformer.config) else None
        with torch.no_grad():
            latents = predictor.sample(self.conditions, Guidance(embedded), range(len(self.masks)), DRAWING_STEPS)
            pictures = family.decode(predictor.pipe, latents)
        iou = [foreground_iou(*pair) for pair in zip(pictures, self.masks, strict=True)]
        return {"iou": round(float(np.mean(iou)), 4), "loss": round(float(torch.stack(losses).mean()), 5)}


def bring(study: Study, judge: Judge, base: str, row: Row, seed: int, steps: int) -> None:
    """Train a row to so many steps, from where it is, and measure it at the marks on its way."""
    from qwen_image_finetune.training.train import train

    config = settings(base, row, seed, steps)
    if not study.marks(base, row, seed):  # perhaps of other settings
        shutil.rmtree(config.logging.project_dir, ignore_errors=True)
    version = train(config)
    assert version is not None
    *before, last = versions.checkpoint_folders(version)
    for folder in (*before, last):
        step = int(folder.name.rpartition("-")[2])
        if step in MARKS and str(step) not in study.marks(base, row, seed):
            study.note(base, row, seed, step, judge(folder / "ema" if config.train.ema.enabled else folder))
    for folder in before:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="after which no run begins; default: until all is known")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help="default: all")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="default: both")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many; default: {len(SEEDS)}")
    parser.add_argument("--steps", type=int, choices=LADDER, default=LADDER[-1], help="of the longest runs")
    parser.add_argument("--page", action="store_true", help="only write the pages")
    options = parser.parse_args(arguments)
    deadline = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    os.chdir(ROOT)  # the configurations name folders from here
    study, judges = Study(KNOWN), dict[str, Judge]()
    rows = [row for row in ROWS if row.name in options.rows]
    everything = tasks(rows, options.bases, SEEDS[: options.seeds], options.steps)
    for base, row, seed, steps in [] if options.page else study.due(everything):
        if time.monotonic() > deadline:
            break
        began = time.process_time()
        judge = judges.get(base) or judges.setdefault(base, Judge(base))
        if base not in study.written["before"]:
            study.written["before"][base] = judge(None)
        bring(study, judge, base, row, seed, steps)
        found = study.marks(base, row, seed)[str(steps)]
        print(f"# {base}, {row.name}, seed {seed}, {steps} steps: IoU {found['iou']:.3f}, loss {found['loss']:.4f}, "
              f"{time.process_time() - began:.0f} s of processor time", flush=True)  # fmt: skip
    quality_page.write(study.written)
    print("\n".join(quality_page.tables(study.written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
