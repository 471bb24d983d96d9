"""What each of several processes does: compares adapters that are cut over all of them with whole ones, kind by kind.

    torchrun ... cut_adapters.py FILE      writes FILE.RANK, a line for each kind: its name and the largest distance

Distances are relative, of the answer, of gradients, and of the weights after a step and after their norm was limited.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.append(str(Path(__file__).parents[1] / "levers"))
from tiny_transformers import disturb, forward, tiny_transformer

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.lora import adapters

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": True},
    "lokr": {"type": "lokr", "decompose_factor": 4},
    "loha": {"type": "loha"},
    "oft": {"type": "oft", "oft_block_size": 8},
}


def learnt(kind: str, cut: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Answer and gradients of a tiny model, and its adapter after a step, before and after the limit on the norm."""
    model = tiny_transformer("flux")
    adapters.add_adapter(model.train(), LoraConfig(r=4, **KINDS[kind]), seed=1)
    disturb(model)
    if cut:
        parallel.shard(model, parallel.Sharding(), torch.device("cpu"))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(isinstance(weight, DTensor) == cut for weight in trained.values())
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    answer = forward(model)
    answer.square().mean().backward()
    gradients = {name: parallel.whole(weight.grad) for name, weight in trained.items() if weight.grad is not None}
    optimizer.step()
    moved = {name: parallel.whole(weight.detach()).clone() for name, weight in trained.items()}
    if kind != "oft":  # which is refused: a rotation has no norm
        adapters.limit_norms(model, 0.5)
    limited = {name: parallel.whole(weight.detach()) for name, weight in trained.items()}
    return answer.detach(), gradients, moved, limited


def distance(one: Any, other: Any) -> float:
    """The largest relative distance of tensors of the same names."""
    if isinstance(one, Tensor):
        return float((one - other).norm() / other.norm())
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12)) for name in one)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    lines = []
    for kind in KINDS:
        whole, cut = learnt(kind, cut=False), learnt(kind, cut=True)
        if kind != "oft":
            assert distance(whole[3], whole[2]) > 0.01  # the limit does something
        lines.append(f"{kind} {max(distance(*pair) for pair in zip(cut, whole, strict=True))}")
    Path(f"{sys.argv[1]}.{torch.distributed.get_rank()}").write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
