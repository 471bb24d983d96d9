"""The samples of a process come in the order of its batches, however they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qwen_image_finetune.config import Config
from qwen_image_finetune.encoding.embeddings import prepare_embeddings
from qwen_image_finetune.training.job import open_job, plan_batches
from qwen_image_finetune.training.stream import micro_batches


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_different_lengths_are_read_in_order(workers: int, configure: Callable[..., Config]) -> None:
    """Which pictures are dropped decides how many batches an epoch has: it is drawn while others are being read."""
    config = configure(
        "FluxKontext",
        f"data.num_workers={workers}",
        "data.batch_size=2",
        "data.init_args.prompt_image_dropout_rate=0.3",
        "data.init_args.caption_dropout_rate=0.3",
        "train.gradient_accumulation_steps=2",
        "train.max_train_steps=150",
    )
    job = open_job(config)
    prepare_embeddings(config, job.rows, job.accelerator, job.say)
    rows, fresh = job.rows.dataset, plan_batches(config, job.rows.dataset, 1)
    expected = [micro for step in range(20, job.total_steps) for micro in fresh.at(step)]
    for _ in range(4):  # threads that were in each other's way were so by chance
        again = replace(job, batches=plan_batches(config, rows, 1))
        read = list(micro_batches(again, None, first_step=20))
        assert [micro for micro, *_ in read] == expected
        assert all(list(batch.keys) == [rows.rows[row].key for row in micro.rows] for micro, batch, _ in read)
