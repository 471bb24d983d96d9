"""What every process of a test does: runs named configurations one after the other. Started by torchrun.

    torchrun ... runs.py FILE.json      a list of {"config": file, "overrides": [...], "do": "train" or "cache"}

"resume": [folder of a version, step] continues that checkpoint. Results go to FILE.RANK.json: the folder of the
version, and the bytes of weights that this process held.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from outcomes import checkpoint

from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.preparation import encode_dataset
from qwen_image_finetune.state import State
from qwen_image_finetune.train import train


def run(task: dict[str, Any]) -> dict[str, Any]:
    resume = [f"train.resume_from_checkpoint={checkpoint(*task['resume'])}"] if "resume" in task else []
    config: Config = load_config(Path(task["config"]), [*task["overrides"], *resume])
    if task.get("do") == "cache":
        encode_dataset(config)
        return {}
    held: list[int] = []
    place = State.__init__

    def measured(self: State, *arguments: Any, **named: Any) -> None:
        place(self, *arguments, **named)
        held.append(parallel.local_bytes(self.learner.transformer))

    State.__init__ = measured  # type: ignore[method-assign]
    try:
        folder = train(config)
    finally:
        State.__init__ = place  # type: ignore[method-assign]
    return {"run": None if folder is None else str(folder), "bytes": held[0]}


def main() -> None:
    tasks = Path(sys.argv[1])
    results = [run(task) for task in json.loads(tasks.read_text())]
    rank = os.environ.get("RANK", "0")
    tasks.with_suffix(f".{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
