"""Steps a second of one, two and four processes on a tiny model, and what the loop costs each of them.

    python scripts/bench.py scaling

Every process has one batch of four a step, by data parallel and sharing the model (FSDP2). Two figures a row: steps a
second by the clock, over all steps but the first few, and CPU seconds that a step takes in a process. On a machine with
fewer cores than processes the clock says little; CPU seconds are then the figure: what is more than one process takes
is the cost of being several (gradients sent, waiting for others in a busy loop of the network library).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
WAYS = {"alone": (1, {}), "DDP 2": (2, {}), "DDP 4": (4, {}), "FSDP2 2": (2, FSDP2), "FSDP2 4": (4, FSDP2)}
SKIPPED, STEPS = 10, 60


def measure(config: Path, way: str, output: Path) -> dict[str, float]:
    """One launch: medians over its processes."""
    processes, environment = WAYS[way]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    subprocess.run(
        [*start, __file__, str(config), str(output)], check=True, capture_output=True, cwd=ROOT,
        env={**clean, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found = [json.loads(output.with_suffix(f".{rank}.json").read_text()) for rank in range(processes)]
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def scaling(config: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Rows of a table, printed; `config` is the configuration of a run."""
    results: dict[str, Any] = {}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(measure(config, way, folder / "scaling"))
    alone = statistics.median(row["cpu"] for row in found["alone"])
    for way, rows in found.items():
        row = {name: statistics.median(each[name] for each in rows) for name in rows[0]}
        results[way] = row
        print(
            f"scaling  {way:8} {1 / row['clock']:5.1f} steps a second ({WAYS[way][0] / row['clock']:5.1f} batches); a "
            f"step takes {1000 * row['cpu']:.0f} ms of CPU in each process ({row['cpu'] / alone:.2f} times one alone), "
            f"{row['held'] / 2**20:.2f} MiB of weights"
        )
    return results


def work(config: Path, output: Path) -> None:
    """In each process: train, and take the time at two steps."""
    from torch.distributed.tensor import DTensor

    from qwen_image_finetune.config import load_config
    from qwen_image_finetune.machine.processes import Team
    from qwen_image_finetune.training.state import State
    from qwen_image_finetune.training.train import train

    marks: list[tuple[float, float]] = []
    held = [0]
    enter, begin = Team.enter, State.__init__

    def marking(team: Team, place: str) -> None:
        enter(team, place)
        if place in (
            f"reading the samples of step {SKIPPED + 1}",
            f"reading the samples of step {SKIPPED + STEPS + 1}",
        ):
            marks.append((time.monotonic(), time.process_time()))

    def holding(state: State, *arguments: Any) -> None:
        begin(state, *arguments)
        for weight in state.learner.transformer.parameters():
            part = weight.to_local() if isinstance(weight, DTensor) else weight
            held[0] += part.numel() * part.element_size()

    Team.enter, State.__init__ = marking, holding  # type: ignore[method-assign]
    train(load_config(config, [f"train.max_train_steps={SKIPPED + STEPS + 1}"]))
    first, last = marks
    figures = {"clock": (last[0] - first[0]) / STEPS, "cpu": (last[1] - first[1]) / STEPS, "held": held[0]}
    output.with_suffix(f".{os.environ.get('RANK', '0')}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
