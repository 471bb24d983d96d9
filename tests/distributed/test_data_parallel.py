"""Two processes with batch 1 learn what one process with accumulation 2 learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import one_machine
from outcomes import furthest, losses, metrics, weights

from qwen_image_finetune.config import ConfigError
from tests.kin import UNLIKE

BOUND = 1e-4  # of the largest movement of a weight: float32 sums of two gradients in another order, over five steps
# Seven pairs of three geometries: with two to a step, a step begins in one epoch and ends in the next.
OPTIONS = (
    "train.max_train_steps=5", "train.checkpointing_steps=1", "optimizer.init_args={lr: 0.1, momentum: 0.9}",
    "optimizer.class_path=torch.optim.SGD", "lr_scheduler.scheduler_type=constant_with_warmup",
    "lr_scheduler.warmup_steps=2", "data.init_args.caption_dropout_rate=0.3",
)  # fmt: skip


def test_two_processes_equal_accumulation(
    task: Callable[..., Any], run_all: Callable[..., Any], alone: Callable[..., Path]
) -> None:
    tasks = [task(name, f"two-{name}", *OPTIONS) for name in UNLIKE]
    tasks += [task(name, f"four-{name}", *OPTIONS, "train.gradient_accumulation_steps=2") for name in UNLIKE]
    references = [alone(job, f"train.gradient_accumulation_steps={2 * (1 + place // len(UNLIKE))}")
                  for place, job in enumerate(tasks)]  # fmt: skip
    # Two processes continue what one began, and the other way round. Same rows, same noise: same losses.
    onwards = task(UNLIKE[0], "onwards", *OPTIONS, resume=[str(references[0]), 2])
    results = run_all(one_machine(2), [*tasks, onwards])
    assert [result["run"] for result in results[1]] == [None] * (len(tasks) + 1)
    for result, reference in zip(results[0], [*references, references[0]], strict=True):
        assert losses(result["run"]) == pytest.approx(losses(reference)[-len(losses(result["run"])) :], rel=1e-5)
        rates = [line["learning_rate"] for line in metrics(result["run"])]
        assert rates == [line["learning_rate"] for line in metrics(reference)][-len(rates) :]
        assert furthest(weights(result["run"]), weights(reference), weights(reference, 1)) < BOUND
    assert [line["learning_rate"] for line in metrics(results[0][0]["run"])] == pytest.approx([0, 0.05, 0.1, 0.1, 0.1])
    assert len(losses(results[0][-1]["run"])) == 3
    back = alone(task(UNLIKE[0], "back", *OPTIONS, "train.gradient_accumulation_steps=2",
                      resume=[results[0][0]["run"], 3]))  # fmt: skip
    assert losses(back) == pytest.approx(losses(references[0])[3:], rel=1e-5)
    assert furthest(weights(back), weights(references[0]), weights(references[0], 1)) < BOUND


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
