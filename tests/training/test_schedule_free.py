"""Schedule-free AdamW: what is saved, drawn, measured and averaged are the weights to be used, not those trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.disk.checkpoint import load_state
from qwen_image_finetune.training.check import check_run
from qwen_image_finetune.training.optim import MUON
from qwen_image_finetune.training.train import train
from qwen_image_finetune.training.trained import exact


def saved(run: Path | None, step: int) -> Path:
    assert run is not None
    return next(run.glob(f"checkpoint-*-{step}"))


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_a_run(configure: Callable[..., Config], tmp_path: Path, write_pairs: Callable[..., Path]) -> None:
    held_out = write_pairs(tmp_path / "held out", [(64, 64)], seed=9)
    settings = {"enabled": True, "steps": 2, "num_validation_samples": 1, "num_inference_steps": 1}
    options = (
        "optimizer={class_path: schedulefree.AdamWScheduleFree, init_args: {lr: 0.01}}", "train.max_train_steps=4",
        "train.checkpointing_steps=2",
    )  # fmt: skip
    looks = (
        f"validation={json.dumps({**settings, 'dataset_path': str(held_out)})}",
        "train.ema={enabled: true, decay: 0}",
    )
    plain = train(configure("FluxKontext", *options, "logging.tracker_project_name=plain"))
    run = train(configure("FluxKontext", *options, *looks))
    assert run is not None
    used, trained = exact(saved(run, 4)), load_state(saved(run, 4), "trained")
    state = load_state(saved(run, 4), "optimizer")["state"]
    assert_equal(trained, load_state(saved(plain, 4), "trained"))  # looking changes nothing
    others = [entry["z"] for entry in state["state"].values()]
    assert len(others) == len(used) == len(trained)
    unlike = 0
    for name, y in trained.items():  # y = (1 - beta1) z + beta1 x, formula 1 of the paper
        candidates = [
            ((y.double() - 0.1 * z.double()) / 0.9 - used[name].double()).abs().max()
            for z in others if z.shape == y.shape
        ]  # fmt: skip
        assert min(candidates) < 1e-6, name
        unlike += not torch.equal(y, used[name])
    assert unlike > len(used) / 2
    assert_equal(exact(saved(run, 4) / "ema"), used)  # of a decay of 0 it is the newest
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    both = [(line["held_out_loss"], line["held_out_loss_average"]) for line in lines if "held_out_loss" in line]
    assert len(both) == 2 and all(loss == averaged for loss, averaged in both)

    again = (f"train.resume_from_checkpoint={saved(plain, 2)}", "logging.tracker_project_name=again")
    resumed = train(configure("FluxKontext", *options, *again))
    assert_equal(exact(saved(resumed, 4)), exact(saved(plain, 4)))
    assert_equal(load_state(saved(resumed, 4), "trained"), trained)


@pytest.mark.parametrize("whole", [False, True])
def test_muon_is_for_matrices(whole: bool, configure: Callable[..., Config]) -> None:
    """Adapters have nothing else; of a whole model the vectors need another optimizer, which is said at once."""
    full = ("model.lora=null",) if whole else ()
    with_vectors = configure("FluxKontext", *full, f"optimizer={{class_path: {MUON}, init_args: {{}}}}")
    check_run(with_vectors)
    alone = configure("FluxKontext", *full, "optimizer={class_path: torch.optim.Muon, init_args: {}}")
    if not whole:
        check_run(alone)
        return
    with pytest.raises(ConfigError, match=r"matrices alone.*pytorch_optimizer\.Muon .*\[optimizers\]"):
        check_run(alone)
