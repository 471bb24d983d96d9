"""Processor time of a training step on a busy machine, with threads that sleep and with threads that spin.

    python scripts/bench_threads.py [--steps 30]

Beside the run, one process a core does nothing but count. `cache` of configs/demo_flux_kontext.yaml comes first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen_image_finetune.machine.threads import CHOICES

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/demo_flux_kontext.yaml"
CHILD = """
import sys, time
from qwen_image_finetune.command import cli
from qwen_image_finetune.disk import runs

times, record = [], runs.Run.record

def timed(self, step, values):
    times.append((time.process_time(), time.monotonic()))
    record(self, step, values)

runs.Run.record = timed
assert cli.main(["train", *sys.argv[1:]]) == 0
for before, after in zip(times[5:], times[6:]):
    print("STEP", after[0] - before[0], after[1] - before[1])
"""


def steps(spins: bool, count: int, folder: str) -> list[tuple[float, float]]:
    """(processor seconds, seconds) of each step but the first ones.

    Args:
        spins: load torch before the command can say how threads wait, as it was before it did.
    """
    overrides = [
        f"train.max_train_steps={count + 6}", "validation.enabled=false", "logging.report_to=none",
        f"logging.output_dir={folder}/output", f"cache.cache_dir={folder}/cache",
    ]  # fmt: skip
    program = "import torch\n" + CHILD if spins else CHILD
    done = subprocess.run(
        [sys.executable, "-c", program, CONFIG, *overrides], cwd=ROOT, check=True, capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name not in CHOICES},
    )  # fmt: skip
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("STEP")]
    return [(float(processor), float(wall)) for _, processor, wall in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    options = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for spins in (False, True):
                found = steps(spins, options.steps, folder)
                processor, wall = (statistics.median(column) for column in zip(*found, strict=True))
                how = "spin" if spins else "sleep"
                print(f"{how:6} {processor * 1000:6.0f} ms of processor time a step, which took {wall * 1000:.0f} ms")
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    main()
