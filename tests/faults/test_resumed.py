"""A resume at any step is the same run: every optimizer, LoRA and full, accumulation, one and two processes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from lab import FAMILIES, FULL, Lab, checkpoints, curve, record, state_of, versions, write_pairs

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim.AdamW": {"lr": 1e-3},
    "bitsandbytes.optim.Adam8bit": {"lr": 1e-3},
    "prodigyopt.Prodigy": {"lr": 1.0},
    "torch.optim.SGD": {"lr": 1e-2, "momentum": 0.9},
}
GRID = list(itertools.product(OPTIMIZERS, ("lora", "full"), (1, 4), (1, 2)))
ROWS = 7  # a prime, so that steps of several micro-batches straddle the end of an epoch


@pytest.mark.timeout(3600)
def test_resumed_at_every_step_of_two_epochs(lab: Lab, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", ROWS)
    chance = random.Random(1)
    tried, lost = 0, []
    # In a sample every optimizer, mode, accumulation and number of processes occurs, though not every combination.
    chosen = GRID if FULL else [GRID[place] for place in (0, 6, 8, 14, 19, 29)]
    for number, (optimizer, mode, accumulation, processes) in enumerate(chosen):
        config = lab.config(
            f"grid-{number}",
            FAMILIES[number % 2],
            model={"lora": None} if mode == "full" else {},
            data={"init_args": {"dataset_path": str(pairs)}},
            train={"num_epochs": 2, "max_train_steps": None, "checkpointing_steps": 1,
                   "gradient_accumulation_steps": accumulation},
            optimizer={"class_path": optimizer, "init_args": OPTIMIZERS[optimizer]},
        )  # fmt: skip
        if optimizer != "torch.optim.AdamW":
            text = config.read_text().replace("lr: 0.01\n", f"lr: {OPTIMIZERS[optimizer]['lr']}\n")
            config.write_text(text)

        def run(*overrides: str, config: Path = config, processes: int = processes) -> None:
            started = lab.run_together(config, *overrides, processes=processes) if processes > 1 else [
                lab.start(config, *overrides)]  # fmt: skip
            for trial in started:
                assert trial.wait() == 0, trial.said()

        run()
        (whole,) = versions(config)
        saved = checkpoints(whole)
        last = max(saved)
        assert last == -(-2 * ROWS // (accumulation * processes))
        steps = range(1, last)
        for step in steps if FULL else [chance.choice(steps)]:
            tried += 1
            run(f"train.resume_from_checkpoint={saved[step]}", f"logging.tracker_project_name=from-{step}")
            resumed = config.parent / "output" / f"from-{step}" / "v0"
            same = state_of(checkpoints(resumed)[last]) == state_of(saved[last])
            if not same or curve(resumed) != curve(whole)[step:]:
                lost.append((optimizer, mode, accumulation, processes, step))
    record(
        "resume at every step", tried, lost, f"{len(chosen)} combinations of optimizer, mode, accumulation, processes"
    )
