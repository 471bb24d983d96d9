"""Validation in one of two processes changes nothing that is trained in both."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from launching import one_machine
from outcomes import weights

OPTIONS = ("train.max_train_steps=5", "train.checkpointing_steps=3", "model.lora.lora_dropout=0.2")
ROUNDS = {"enabled": True, "share": 0.3, "num_validation_samples": 1, "num_inference_steps": 1}


def test_two_processes_validate_and_learn_the_same(task: Callable[..., Any], run_all: Callable[..., Any]) -> None:
    often, never = {**ROUNDS, "steps": 2}, {**ROUNDS, "steps": 100, "num_loss_pairs": 0}
    tasks = [task("FluxKontext", name, *OPTIONS, f"validation={json.dumps(settings)}")
             for name, settings in (("often", often), ("never", never))]  # fmt: skip
    results = run_all(one_machine(2), tasks)[0]
    validated, plain = (weights(result["run"]) for result in results)
    assert validated.keys() == plain.keys()
    assert not [name for name in plain if not torch.equal(validated[name], plain[name])]
    with open(f"{results[0]['run']}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 3, 4, 5]
