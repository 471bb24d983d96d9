"""What every process of a test does: runs named configurations one after the other. Started by torchrun.

    torchrun ... runs.py FILE.json      a list of {"config": file, "overrides": [...]}

"do" is "train", unless it is "cache", or "refused": what must not run. "family" is a module that registers one.
"resume": [folder of a version, step] continues that checkpoint, "again" is a folder to write it to as soon as it is
loaded. "shared": whether the model is, whatever the launch says. Results go to FILE.RANK.json: the version folder and
bytes of weights that this process held, or the words of the refusal.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from outcomes import checkpoint
from torch import nn
from torch.distributed.tensor import DTensor

from qwen_image_finetune.config import Config, ConfigError, load_config
from qwen_image_finetune.encoding.embeddings import encode_dataset
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.training.state import State
from qwen_image_finetune.training.train import train

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def run(task: dict[str, Any]) -> dict[str, Any]:
    if "family" in task:
        importlib.import_module(task["family"])
    if "shared" in task:
        parallel.requested.cache_clear()
        os.environ.update({**FSDP2, parallel.ASKED: str(task["shared"]).lower()})
    resume = [f"train.resume_from_checkpoint={checkpoint(*task['resume'])}"] if "resume" in task else []
    config: Config = load_config(Path(task["config"]), [*task["overrides"], *resume])
    if task.get("do") == "cache":
        encode_dataset(config)
        return {}
    if task.get("do") == "refused":
        return {"refused": refusal(config)}
    held: list[int] = []
    begin, load = State.__init__, State.load

    def measured(self: State, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        held.append(local_bytes(self.learner.transformer))

    def written_again(self: State, folder: Path) -> None:
        load(self, folder)
        snapshot = self.snapshot(keep=self.job.team.main)
        if self.job.team.main:
            again = Path(task["again"])
            again.mkdir()
            self.write(again, snapshot)

    State.__init__ = measured  # type: ignore[method-assign]
    if "again" in task:
        State.load = written_again  # type: ignore[method-assign]
    try:
        folder = train(config)
    finally:
        State.__init__, State.load = begin, load  # type: ignore[method-assign]
    return {"run": None if folder is None else str(folder), "bytes": held[0]}


def local_bytes(transformer: nn.Module) -> int:
    """Bytes of parameters that this process holds; those on "meta" are elsewhere."""
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in transformer.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_meta)


def refusal(config: Config) -> str:
    try:
        train(config)
    except ConfigError as error:
        return str(error)
    raise AssertionError("a run that must be refused has ended well")


def main() -> None:
    tasks = Path(sys.argv[1])
    results = [run(task) for task in json.loads(tasks.read_text())]
    rank = os.environ.get("RANK", "0")
    tasks.with_suffix(f".{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
