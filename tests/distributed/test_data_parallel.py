"""Two processes with batch 1 learn what one process with accumulation 2 learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import one_machine
from outcomes import furthest, losses, metrics, weights

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.training.train import train
from tests.kin import UNLIKE

BOUND = 1e-4  # of the largest movement of a weight: float32 sums of two gradients in another order, over five steps
# Seven pairs of three geometries: with two to a step, a step begins in one epoch and ends in the next.
OPTIONS = (
    "train.max_train_steps=5", "train.checkpointing_steps=1", "optimizer.init_args={lr: 0.1, momentum: 0.9}",
    "optimizer.class_path=torch.optim.SGD", "lr_scheduler.scheduler_type=constant_with_warmup",
    "lr_scheduler.warmup_steps=2", "data.init_args.caption_dropout_rate=0.3",
)  # fmt: skip


def test_two_processes_equal_accumulation(
    task: Callable[..., Any],
    run_all: Callable[..., Any],
    alone: Callable[..., Path],
    write_pairs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Sums of every family; what is the loop's own, with one of them: accumulation, a second term of the loss, with
    the run's pairs or others, and noise levels that are spread over a step."""
    tasks = [task(name, f"two-{name}", *OPTIONS) for name in UNLIKE]
    references = [alone(job, "train.gradient_accumulation_steps=2") for job in tasks]
    twice = "train.gradient_accumulation_steps=2"
    tasks.append(task("FluxKontext", "four", *OPTIONS, twice, "loss.preservation.weight=0.5"))
    references.append(alone(tasks[-1], "train.gradient_accumulation_steps=4"))
    kept = write_pairs(tmp_path / "kept", [(64, 64)] * 3 + [(96, 32)], seed=5)
    tasks.append(task("FluxKontext", "kept", *OPTIONS, f"loss.preservation={{weight: 0.5, dataset_path: {kept}}}",
                      "train.sigma_stratified=true"))  # fmt: skip
    references.append(alone(tasks[-1], twice))
    # Two processes continue what one began, and the other way round. Same rows, same noise: same losses.
    onwards = task(UNLIKE[0], "onwards", *OPTIONS, resume=[str(references[0]), 2])
    results = run_all(one_machine(2), [*tasks, onwards])
    assert [result["run"] for result in results[1]] == [None] * (len(tasks) + 1)
    for result, reference in zip(results[0], [*references, references[0]], strict=True):
        assert losses(result["run"]) == pytest.approx(losses(reference)[-len(losses(result["run"])) :], rel=1e-5)
        second, expected = ([line["preservation_loss"] for line in metrics(run) if "preservation_loss" in line]
                            for run in (result["run"], reference))  # fmt: skip
        assert second == pytest.approx(expected, rel=1e-3, abs=1e-9)
        rates = [line["learning_rate"] for line in metrics(result["run"])]
        assert rates == [line["learning_rate"] for line in metrics(reference)][-len(rates) :]
        assert furthest(weights(result["run"]), weights(reference), weights(reference, 1)) < BOUND
    assert [line["learning_rate"] for line in metrics(results[0][0]["run"])] == pytest.approx([0, 0.05, 0.1, 0.1, 0.1])
    assert len(losses(results[0][-1]["run"])) == 3
    assert min(metrics(result["run"])[-1]["preservation_loss"] for result in results[0][-3:-1]) > 0
    back = alone(task(UNLIKE[0], "back", *OPTIONS, "train.gradient_accumulation_steps=2",
                      resume=[results[0][0]["run"], 3]))  # fmt: skip
    assert losses(back) == pytest.approx(losses(references[0])[3:], rel=1e-5)
    assert furthest(weights(back), weights(references[0]), weights(references[0], 1)) < BOUND


def test_two_processes_train_as_one_with_twice_the_accumulation(
    configure: Callable[..., Any], torchrun: Callable[..., Any], tmp_path: Path
) -> None:
    """By the command that users start. Same samples, noise and schedule; sums are rounded in another order."""
    same = ["optimizer.class_path=torch.optim.SGD", "data.init_args.caption_dropout_rate=0.3"]
    same += ["train.max_train_steps=4", "lr_scheduler.scheduler_type=cosine", "lr_scheduler.warmup_steps=1"]
    alone = train(configure("FluxKontext", *same, "train.gradient_accumulation_steps=2"))
    assert alone is not None
    words = ["--config", str(tmp_path / "config.yaml"), *same, "logging.tracker_project_name=two"]
    done = torchrun(2, "-m", "src.main", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    together = tmp_path / "output" / "two" / "v0"
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    found = weights(together)
    for name, tensor in weights(alone).items():
        assert torch.allclose(tensor, found[name], rtol=1e-4, atol=1e-6), name


def test_what_is_chosen_for_a_card_is_chosen_for_the_fullest(torchrun: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "fullest.py"
    script.write_text(
        "from accelerate import Accelerator\nfrom qwen_image_finetune.training.job import least\n"
        "one = Accelerator(cpu=True)\n"
        "assert least(one, 5 - 2 * one.process_index) == 3\nassert least(one, None) is None\n"
    )
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_number_of_batches_a_step_is_refused(task: Callable[..., Any], alone: Callable[..., Path]) -> None:
    first = alone(task("FluxKontext", "first", *OPTIONS))
    with pytest.raises(ConfigError, match=r"times processes=2, but .* was trained with 1: .*set them so that"):
        alone(task("FluxKontext", "other", *OPTIONS, "train.gradient_accumulation_steps=2", resume=[str(first), 2]))
