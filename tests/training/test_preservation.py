"""The second loss term: the model's own answers to other prompts, against two models side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_image_finetune import flow, loading
from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.encoding.embeddings import prepare_embeddings, prepare_held_out
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.estimate import Estimator
from qwen_image_finetune.fitting.plan_numbers import numbers
from qwen_image_finetune.fitting.plan_words import describe
from qwen_image_finetune.fitting.speed import Step, card_called, floor, seconds
from qwen_image_finetune.lora.adapters import second_factors
from qwen_image_finetune.training.assembly import assemble
from qwen_image_finetune.training.check import check_run
from qwen_image_finetune.training.job import open_job
from qwen_image_finetune.training.objective import Objective
from qwen_image_finetune.training.stream import micro_batches
from qwen_image_finetune.training.train import train
from qwen_image_finetune.training.trained import exact

Configure = Callable[..., Config]
TERM = 'loss.preservation={weight: 0.5, prompts: ["keep it as it is", "a photo of a cat on a table"]}'
SAME = ("data.batch_size=2", "train.max_train_steps=4", "data.init_args.caption_dropout_rate=0.4")


def weights(run: Path | None, step: int) -> dict[str, Tensor]:
    assert run is not None
    return exact(next(run.glob(f"checkpoint-*-{step}")))


def lines(run: Path | None) -> list[dict[str, Any]]:
    assert run is not None
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path | None) -> list[tuple[float, float]]:
    return [(line["loss"], line["preservation_loss"]) for line in lines(run)]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_it_is_the_squared_distance_of_two_models(configure: Configure) -> None:
    """The other one was never adapted; its prompt is encoded by itself, and what the gradient takes it for is fixed."""
    config = configure("FluxKontext", TERM, "data.batch_size=2", "train.guidance_scale=2.5",
                       "model.lora.lora_dropout=0.5", "loss.type=l1", "train.seed=3")  # fmt: skip
    job = open_job(config)
    prepare_embeddings(config, job.rows, job.accelerator, job.say)
    learner = assemble(job, None)
    adapted = learner.transformer
    with torch.no_grad():
        for factor in second_factors(adapted, "default"):
            factor.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    base = loading.load_transformer(job.family, job.folder, torch.float32)
    scheduler = loading.load_scheduler(job.folder).config
    objective = Objective(config, job.family, adapted, scheduler, job.accelerator)
    pipe = loading.load_encoders(job.family, job.folder, torch.float32, {"default": torch.device("cpu")})

    prompts = config.loss.preservation.prompts
    alone = [job.family.encode_text(pipe, prompt) for prompt in prompts]
    asked = set()
    for micro, batch, second in list(micro_batches(job, None, 0))[:3]:
        assert second is not None and second.batch.keys == batch.keys and second.micro == micro
        preserved = second.batch
        assert torch.equal(preserved.target, batch.target)
        for place, key in enumerate(batch.keys):
            number = flow.seed_of("preservation", 3, key, micro.visits[place]) % len(prompts)
            asked.add(number)
            for name, tensor in alone[number].items():
                text = preserved.text[name][place]
                assert torch.equal(text if tensor.ndim == 1 else text[: len(tensor)], tensor)
    assert asked == {0, 1}

    found = objective.preservation(adapted, preserved, micro)
    gradients = torch.autograd.grad(found.sum(), learner.parameters, allow_unused=True)

    sigma, noise = flow.draw(preserved.keys, micro.visits, 3, preserved.target.shape[1:],
                             "logit_normal", objective.shift(preserved.target.shape))  # fmt: skip
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1 - level) * preserved.target + level * noise
    with torch.no_grad():
        own = job.family.velocity(base, noisy, sigma, preserved, 2.5)
    torch.manual_seed(flow.seed_of("dropout of preservation", 3, *preserved.keys, *micro.visits))
    learnt = job.family.velocity(adapted, noisy, sigma, preserved, 2.5)
    expected = (learnt - own).square().mean(dim=(1, 2, 3))
    assert float(expected.detach().min()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    by_hand = torch.autograd.grad(expected.sum(), learner.parameters, allow_unused=True)
    for ours, theirs in zip(gradients, by_hand, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_it_adds_to_the_gradient_by_its_weight(configure: Configure) -> None:
    """With plain steps of SGD. The first step is the plain one: nothing was learnt yet that could differ."""
    plain = ("train.max_train_steps=2", "train.checkpointing_steps=1", "train.max_grad_norm=null",
             "optimizer.class_path=torch.optim.SGD", "optimizer.init_args.lr=1.0", "cache.use_cache=true")  # fmt: skip
    runs = {
        weight: train(configure("FluxKontext", *plain, f"loss.preservation.weight={weight}",
                                f"logging.tracker_project_name=at-{weight}"))
        for weight in (0, 2, 6)
    }  # fmt: skip
    before = weights(runs[0], 1)
    for weight in (2, 6):
        assert_equal(weights(runs[weight], 1), before)
        assert [line["loss"] for line in lines(runs[weight])] == [line["loss"] for line in lines(runs[0])]
        first, second = (line["preservation_loss"] for line in lines(runs[weight]))
        assert first == 0 < second
    assert all("preservation_loss" not in line for line in lines(runs[0]))
    moved = [{name: value - weights(runs[0], 2)[name] for name, value in weights(runs[weight], 2).items()}
             for weight in (2, 6)]  # fmt: skip
    scale = max(float(value.abs().max()) for value in moved[0].values())
    assert scale > 1e-5
    for name, value in moved[0].items():
        torch.testing.assert_close(3 * value, moved[1][name], rtol=1e-3, atol=1e-3 * scale)


def test_without_weight_it_is_not_there(configure: Configure) -> None:
    given = configure("FluxKontext", *SAME, TERM.replace("0.5", "0.0"), "logging.tracker_project_name=given")
    assert any("loss.preservation.prompts" in note and "has no effect" in note for note in given.notes)
    assert_equal(weights(train(given), 4), weights(train(configure("FluxKontext", *SAME)), 4))


def test_resumed_and_uncached_it_is_the_same(configure: Configure) -> None:
    """To the bit: with two micro-batches a step, both dropouts, and processes that read."""
    same = (*SAME, TERM, "train.gradient_accumulation_steps=2", "train.checkpointing_steps=2",
            "data.init_args.prompt_image_dropout_rate=0.3")  # fmt: skip
    whole = train(configure("FluxKontext", *same))
    assert whole is not None and min(second for _, second in curve(whole)[1:]) > 0
    going_on = f"train.resume_from_checkpoint={next(whole.glob('checkpoint-*-2'))}"
    resumed = train(configure("FluxKontext", *same, going_on, "logging.tracker_project_name=resumed"))
    assert curve(resumed) == curve(whole)[2:]
    uncached = train(configure("FluxKontext", *same, "cache.use_cache=false", "logging.tracker_project_name=uncached"))
    assert curve(uncached) == curve(whole)
    for other in (resumed, uncached):
        assert_equal(weights(other, 4), weights(whole, 4))


def test_with_pairs_of_its_own(configure: Configure, write_pairs: Callable[..., Path], tmp_path: Path) -> None:
    """Its samples are those of the folder, in an order of their own, whole: nothing of them is dropped or masked.

    Resumed and without the cache it learns the same bits; the sentences of `prompts` are not asked.
    """
    kept = write_pairs(tmp_path / "kept", [(64, 64)] * 3 + [(96, 32)], seed=5)
    same = (*SAME, "train.gradient_accumulation_steps=2", "train.checkpointing_steps=2", "train.max_train_steps=3",
            f"loss.preservation={{weight: 0.5, dataset_path: {kept}}}", "data.init_args.prompt_image_dropout_rate=0.3",
            "data.init_args.caption_dropout_rate=0.9", "train.seed=3")  # fmt: skip
    config = configure("FluxKontext", *same)
    job = open_job(config)
    assert job.preserved is not None and job.preserved_batches is not None
    prepare_embeddings(config, job.rows, job.accelerator, job.say)
    prepare_held_out(config, job.preserved, job.accelerator, job.say)
    asked = [second for _, _, second in micro_batches(job, None, 0)]
    expected = [micro for step in range(3) for micro in job.preserved_batches.at(step)]
    for second, micro in zip(asked, expected, strict=True):
        assert (
            second is not None and second.micro == micro and not micro.drop_references and not any(micro.drop_caption)
        )
        assert second.batch.keys == tuple(job.preserved.dataset.rows[row].key for row in micro.rows)
        assert torch.equal(second.batch.target[0], job.preserved.read(micro.rows[0]).target)
    assert {row for micro in expected for row in micro.rows} == {0, 1, 2, 3}

    whole = train(config)
    assert whole is not None and min(second for _, second in curve(whole)[1:]) > 0
    going_on = f"train.resume_from_checkpoint={next(whole.glob('checkpoint-*-2'))}"
    resumed = train(configure("FluxKontext", *same, going_on, "cache.use_cache=false",
                              "logging.tracker_project_name=resumed"))  # fmt: skip
    assert curve(resumed) == curve(whole)[2:]
    assert_equal(weights(resumed, 3), weights(whole, 3))


def test_what_is_refused(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"loss\.preservation\.weight=0\.5 and model\.lora.* a second copy"):
        configure("FluxKontext", "model.lora=null", TERM)
    with pytest.raises(ConfigError, match=r"loss\.preservation\.prompts"):
        configure("FluxKontext", "loss.preservation={weight: 1, prompts: []}")
    with pytest.raises(ConfigError, match=r"loss\.preservation\.dataset_path='nowhere': no folder"):
        check_run(configure("FluxKontext", "loss.preservation={weight: 1, dataset_path: nowhere}"))
    both = configure("FluxKontext", "loss.preservation={weight: 1, dataset_path: nowhere, prompts: [a]}")
    assert any("loss.preservation.prompts" in note and "prompts of their own" in note for note in both.notes)
    with pytest.raises(DataError, match=r"loss\.preservation\.prompts, '<pad>': .*control token"):
        train(configure("FluxKontext", 'loss.preservation={weight: 1, prompts: ["<pad>"]}', "cache.use_cache=false"))


def test_the_plan_counts_its_passes(configure: Configure) -> None:
    """A second pair of passes and one more forwards: of the products of a frozen model, 5 in place of 2."""
    config = configure("FluxKontext")
    estimator = Estimator(get_family("FluxKontext"), config, Path(config.model.pretrained_model_name_or_path))
    found, card = estimator.footprint, card_called("H100")
    assert card is not None
    assert 2 * found.work(None, True).products == 5 * found.work(None).products
    plain, both = Step("none", True, None, "flash"), Step("none", True, None, "flash", preserves=True)
    forward = found.work(None).attention_forward / card.products + found.work(None).products / 2 / card.products
    assert floor(found, both, card) == pytest.approx(2 * floor(found, plain, card) + forward / 1e12)
    times = [seconds(found, step, card) for step in (plain, both)]
    assert times[0] is not None and times[1] is not None and 2 < times[1] / times[0] < 2.5
    asked = configure("FluxKontext", TERM)
    assert estimator.estimate(asked).device == estimator.estimate().device
    assert estimator.estimate(asked).operations > 2 * estimator.estimate().operations
    assert "forward and backward twice, and forward once without the adapter" in describe(asked, "H100")


def test_the_plan_counts_pairs_of_another_size(configure: Configure) -> None:
    """Operations and seconds of each pair of passes are those of its own size; memory is that of the larger."""
    runs, family = [{"path": "data/face_seg", "resolution": side} for side in (256, 384)], get_family("FluxKontext")

    def planned(own: int, kept: int | None) -> tuple[Estimator, float]:
        term = {"weight": 0 if kept is None else 1, "dataset_path": [runs[kept or 0]]}
        config = configure("FluxKontext", "train.mixed_precision=bf16", "data.init_args.resolution=null",
                           f"data.init_args.dataset_path={json.dumps([runs[own]])}",
                           f"loss.preservation={json.dumps(term)}")  # fmt: skip
        estimator = Estimator(family, config, None)
        seconds = numbers(config, "H100")["step_seconds"]
        text = describe(config, "H100")
        assert ("its pairs have" in text) == (kept is not None and kept != own)
        assert f"target and references {(256, 384)[own]}x" in text
        return estimator, seconds

    for own, kept in ((0, 1), (1, 0)):
        (found, seconds), (plain, alone) = planned(own, kept), planned(own, None)
        (both, with_both), (other, without) = planned(kept, kept), planned(kept, None)
        operations = [each.estimate().operations for each in (found, plain, both, other)]
        assert operations[0] == operations[1] + operations[2] - operations[3]
        assert seconds == pytest.approx(alone + with_both - without)
        assert found.estimate().device == planned(1, 1)[0].estimate().device
