"""Two machines, each with its own launcher, that meet on the loopback: what one machine learns, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import accelerated, free_port, one_machine
from outcomes import losses, weights

OPTIONS = ("train.max_train_steps=3", "train.checkpointing_steps=1")


def test_two_machines_equal_one(task: Callable[..., Any], run_all: Callable[..., Any]) -> None:
    """LoRA by data parallel, a LoRA over a shared base and a shared full fine-tune."""

    def tasks(place: str) -> list[dict[str, Any]]:
        return [
            task("QwenImageEdit", f"parallel-{place}", *OPTIONS, shared=False),
            task("FluxKontext", f"lora-{place}", *OPTIONS, shared=True),
            task("FluxKontext", f"full-{place}", *OPTIONS, "model.lora=null", shared=True),
        ]

    port = str(free_port())
    machines = [
        accelerated("two_machines.yaml", 2, "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                    "--main_process_port", port)
        for rank in range(2)
    ]  # fmt: skip
    far, near = (run_all(machines, tasks("two"))[0], run_all(one_machine(2), tasks("one"))[0])
    for ours, theirs in zip(far, near, strict=True):
        assert losses(ours["run"]) == losses(theirs["run"])
        expected = weights(theirs["run"])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours["run"]).items())
        assert ours["bytes"] == theirs["bytes"]
