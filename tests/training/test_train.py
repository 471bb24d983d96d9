"""The loop: what is learnt does not depend on how it is reached."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.training.train import patience, train
from qwen_image_finetune.training.trained import exact, halves, joined
from tests.kin import TWO, UNLIKE

Configure = Callable[..., Config]


def weights(run: Path | None) -> dict[str, Tensor]:
    """Trained weights of the newest checkpoint of a version."""
    assert run is not None
    folder = max(run.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return exact(folder)


def optimizer_state(run: Path | None) -> dict[str, Tensor]:
    assert run is not None
    folder = max(run.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return load_file(folder / "optimizer.safetensors")


def losses(run: Path | None) -> list[float]:
    assert run is not None
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to `tolerance` of the largest weight."""
    assert first.keys() == second.keys()
    for name, expected in first.items():
        scale = float(expected.abs().max().clamp(min=1e-3))
        assert float((expected - second[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("name", TWO)
def test_cached_equals_uncached(name: str, configure: Configure) -> None:
    """Same losses, same weights; with both dropouts, flips and two epochs (of four batches), so two shuffles.

    families/test_conditioning.py reads every family's embeddings from the cache, and they are the pipeline's.
    """
    options = (
        "data.batch_size=2",
        "data.init_args.caption_dropout_rate=0.4",
        "train.max_train_steps=7",
        "data.init_args.prompt_image_dropout_rate=0.4",
        "data.init_args.random_flip=true",
        "cache.num_variations=3",
    )
    cached = train(configure(name, *options))
    uncached = train(configure(name, *options, "cache.use_cache=false"))
    assert losses(cached) == losses(uncached)
    assert_equal(weights(cached), weights(uncached))


@pytest.mark.parametrize("name", TWO)
def test_two_micro_batches_equal_one_batch_of_two(name: str, configure: Configure, tmp_path: Path) -> None:
    """Batch 2 equals twice batch 1: same samples, same noise, same gradients up to float32 summation.

    families/test_conditioning.py has two rows in one batch of every family.
    """
    same = (
        "data.init_args.resolution=null",
        "data.init_args.image_size=[64,64]",
        "data.shuffle=false",
        "train.max_train_steps=3",  # within the first epoch of 7 rows
        "optimizer.class_path=torch.optim.SGD",
    )
    batched = train(configure(name, *same, "data.batch_size=2"))
    other = "logging.tracker_project_name=other"  # versions of fewer than 5 steps make way for the next of a project
    accumulated = train(configure(name, *same, "train.gradient_accumulation_steps=2", other))
    assert losses(batched) == pytest.approx(losses(accumulated), rel=1e-5)
    assert_close(weights(batched), weights(accumulated), 1e-4)


@pytest.mark.parametrize(("accumulation", "name"), [*((3, name) for name in TWO), (1, "FluxKontext")])
def test_resume_is_bit_identical(name: str, accumulation: int, configure: Configure) -> None:
    """Stopped in the middle of an epoch (7 rows) and, with 3 micro-batches a step, across an epoch's end."""
    same = (
        f"train.gradient_accumulation_steps={accumulation}",
        "lr_scheduler.scheduler_type=cosine",
        "lr_scheduler.warmup_steps=2",
        "train.checkpointing_steps=4",
        "train.max_train_steps=9",
        "data.init_args.caption_dropout_rate=0.3",
    )
    whole = train(configure(name, *same, "logging.tracker_project_name=whole"))
    assert whole is not None
    checkpoint = next(whole.glob("checkpoint-*-4"))
    resumed = train(
        configure(name, *same, f"train.resume_from_checkpoint={checkpoint}", "logging.tracker_project_name=other")
    )
    assert resumed is not None and resumed != whole
    assert losses(resumed) == losses(whole)[4:]
    assert_equal(weights(resumed), weights(whole))
    assert_equal(optimizer_state(resumed), optimizer_state(whole))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            ("model.lora.lora_alpha=8", "train.seed=1"),
            r"lora_alpha=8.0, but .* with 4.0: .*\ntrain.seed=1, but .* with 42",
        ),
        (("model.lora.r=2",), "model.lora.r=2, but .* with 4: the adapter has that rank"),
        (("model.lora=null",), "is a checkpoint of a LoRA"),
        (("model.pretrained_model_name_or_path={other}",), "with another one, start a run with model.lora.pretrained"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_before_a_model_loads(
    change: tuple[str, ...], words: str, configure: Configure, tmp_path: Path, flux_folder: Path
) -> None:
    train(configure("FluxKontext", "train.max_train_steps=5"))
    other = shutil.copytree(flux_folder, tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    changes = [each.format(other=other) for each in change]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=words):
        patch.setattr("qwen_image_finetune.training.train.assemble", lambda *_, **__: pytest.fail("too late"))
        train(configure("FluxKontext", "train.resume_from_checkpoint=latest", *changes))


def test_a_run_may_go_on_with_other_batches_which_is_said(
    configure: Configure, tmp_path: Path, flux_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its base may have moved meanwhile."""
    first = train(configure("FluxKontext", "train.max_train_steps=5"))
    moved = f"model.pretrained_model_name_or_path={shutil.copytree(flux_folder, tmp_path / 'moved')}"
    second = train(configure("FluxKontext", "train.resume_from_checkpoint=latest", "data.batch_size=2", moved))
    assert second == first and len(losses(second)) == 6
    said = capsys.readouterr().out
    assert said.count("from here on") == 1
    assert "note: data.batch_size=2, but" in said and "was trained with 1:" in said


def test_whatever_changes_what_is_learnt_is_said_on_a_resume(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    train(configure("FluxKontext", "train.max_train_steps=5"))
    changed = ["train.sigma_shift=3.0", "train.sigma_distribution=uniform", "train.guidance_scale=3.5",
               "train.max_grad_norm=0.5", "data.init_args.random_flip=true", "loss.foreground_weight=4.0"]  # fmt: skip
    train(configure("FluxKontext", "train.resume_from_checkpoint=latest", *changed))
    said = capsys.readouterr().out
    assert said.count("from here on") == len(changed) + 1
    assert "note: the number of crops and flips of each sample=1, but" in said
    for change in changed:
        assert f"note: {change.partition('=')[0]}=" in said


def test_a_checkpoint_from_before_settings_were_kept_can_be_resumed(configure: Configure) -> None:
    with pytest.MonkeyPatch.context() as patch:
        older = {"seed": 42, "micro_batches_per_step": 1}
        patch.setattr("qwen_image_finetune.training.state.settings", lambda job: older)
        train(configure("FluxKontext", "train.max_train_steps=5"))
    assert len(losses(train(configure("FluxKontext", "train.resume_from_checkpoint=latest")))) == 6


def test_a_longer_run_goes_on_at_the_rate_of_its_own_schedule(configure: Configure) -> None:
    """The rate of the first run is zero where it ends."""
    options = ("lr_scheduler.scheduler_type=cosine", "train.resume_from_checkpoint=latest")
    train(configure("FluxKontext", *options, "train.max_train_steps=5"))
    run = train(configure("FluxKontext", *options, "train.max_train_steps=10"))
    assert run is not None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [0.005 * (1 + math.cos(math.pi * step / 10)) for step in range(5, 10)]
    assert [line["learning_rate"] for line in lines[5:]] == pytest.approx(expected)


@pytest.mark.parametrize(
    "optimizer", ["torch.optim.AdamW", "torch.optim.SGD", "bitsandbytes.optim.Adam8bit", "prodigyopt.Prodigy"]
)
@pytest.mark.parametrize("mode", ["lora", "full"])  # in full, weights are large enough for states of 8 bits
def test_resume_is_bit_identical_for_every_optimizer(optimizer: str, mode: str, configure: Configure) -> None:
    special = {"torch.optim.SGD": "{lr: 0.01, momentum: 0.9}", "prodigyopt.Prodigy": "{lr: 1.0}"}
    rate = special.get(optimizer, "{lr: 0.001}")
    same = (
        f"optimizer.class_path={optimizer}",
        f"optimizer.init_args={rate}",
        "train.max_train_steps=5",
        "train.checkpointing_steps=3",
        "data.init_args.resolution=null",
        "data.init_args.image_size=[64,64]",
        *(["model.lora=null"] if mode == "full" else []),
    )
    whole = train(configure("FluxKontext", *same))
    assert whole is not None
    before, state = losses(whole), (weights(whole), optimizer_state(whole))
    checkpoint = next(whole.glob("checkpoint-*-3"))
    resumed = train(configure("FluxKontext", *same, f"train.resume_from_checkpoint={checkpoint}"))
    assert resumed == whole, "a resumed run continues its own version"
    assert losses(resumed) == before
    assert_equal(weights(resumed), state[0])
    assert_equal(optimizer_state(resumed), state[1])


def test_latest_finds_the_newest_checkpoint_and_starts_afresh_without_one(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("train.resume_from_checkpoint=latest", "train.checkpointing_steps=2", "train.max_train_steps=5")
    first = train(configure("QwenImageEdit", *options))
    assert "starting afresh" in capsys.readouterr().out
    again = train(configure("QwenImageEdit", *options, "train.max_train_steps=7"))
    assert again == first
    assert "at step 5" in capsys.readouterr().out
    assert len(losses(again)) == 7


def test_what_was_left_unfinished_and_what_is_finished_is_said(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(configure("FluxKontext"))
    assert run is not None
    before = weights(run)
    ended = (run / "run.json").read_text()
    capsys.readouterr()
    assert train(configure("FluxKontext", "train.resume_from_checkpoint=latest")) == run
    assert "is at step 6 of 6: nothing is left to train" in capsys.readouterr().out
    assert (run / "run.json").read_text() == ended
    assert_equal(weights(run), before)

    (run / "run.json").write_text('{"state": "running", "step": 0}\n')  # as a kill leaves it
    assert train(configure("FluxKontext")) != run
    assert f"note: {run} ended at step 6 without finishing" in capsys.readouterr().out


def test_a_run_may_start_from_a_short_version_of_its_own_project(configure: Configure) -> None:
    """Versions of fewer than five steps make way for a new one, but not the one that it starts from."""
    first = train(configure("FluxKontext", "train.max_train_steps=2", "optimizer.init_args.lr=0.01"))
    options = ("train.max_train_steps=1", "optimizer.init_args.lr=0.0")
    second = train(configure("FluxKontext", *options, f"model.lora.pretrained_weight={first}"))
    assert second != first
    assert_equal(weights(second), weights(first))


def test_the_lora_of_a_run_says_what_it_is_and_nothing_of_this_machine(configure: Configure, tmp_path: Path) -> None:
    config = configure("FluxKontext", "train.max_train_steps=2", "model.lora.target_modules=[to_q]")
    run = train(config)
    assert run is not None
    with safe_open(next(run.glob("checkpoint-*-2")) / "pytorch_lora_weights.safetensors", "pt") as file:
        about = file.metadata()
    expected = {
        "ss_base_model_version": Path(config.model.pretrained_model_name_or_path).name,
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_steps": "2",
        "ss_resolution": "(64, 64)",
        "qif.family": "FluxKontext",
        "qif.sampling": json.dumps({"num_inference_steps": 28, "guidance_scale": 3.5}),
    }
    assert expected.items() <= about.items()
    assert "to_q" in about["qif.target_modules"]
    folders = (config.model.pretrained_model_name_or_path, *map(str, config.data.init_args.folders), str(tmp_path))
    assert not [name for name, value in about.items() if any(folder in value for folder in folders)]


@pytest.mark.parametrize("name", UNLIKE)
def test_full_fine_tuning_is_saved_as_a_transformer_that_loads(name: str, configure: Configure) -> None:
    from qwen_image_finetune.families import get_family

    config = configure(name, "model.lora=null", "train.max_train_steps=2", "optimizer.init_args.lr=0.001")
    run = train(config)
    assert run is not None
    folder = next(run.glob("checkpoint-*-2"))
    trained = get_family(name).transformer.from_pretrained(folder / "transformer").state_dict()
    base = (
        get_family(name)
        .transformer.from_pretrained(config.model.pretrained_model_name_or_path, subfolder="transformer")
        .state_dict()
    )
    assert trained.keys() == base.keys()
    masters = exact(folder)
    moved = [key for key in base if not torch.equal(base[key], masters[key])]
    assert len(moved) > 0.9 * len(base)

    # In bfloat16 for its users, with every bit of float32 for a resume; or in float32, if that is asked for
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[key].float(), trained[key].float()) for key in base)
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    plain = train(config.model_copy(update={"train": config.train.model_copy(update={"save_precision": "fp32"})}))
    whole = next(plain.glob("checkpoint-*-2"))
    assert_equal(load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors"), masters)
    assert not (whole / "remainder.safetensors").exists()


def test_the_halves_of_a_weight_give_every_bit_back() -> None:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (1000, 1000), generator=generator).to(torch.int32)
    some = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0, -(2**31)])
    for weight in (bits.view(torch.float32), some.to(torch.int32).view(torch.float32)):
        upper, remainder = halves(weight)
        assert torch.equal(joined(upper, remainder).view(torch.int32), weight.view(torch.int32))
    weight = torch.randn(1000, 1000, generator=generator)
    upper = halves(weight)[0]
    nearest = (weight.bfloat16().double() - weight.double()).abs()
    assert torch.equal((upper.double() - weight.double()).abs(), nearest)


def test_steps_are_optimizer_steps_whatever_the_accumulation(configure: Configure) -> None:
    options = (
        "train.max_train_steps=4",
        "train.checkpointing_steps=2",
        "lr_scheduler.scheduler_type=constant_with_warmup",
        "lr_scheduler.warmup_steps=4",
    )
    for accumulation in (1, 4):
        run = train(configure("FluxKontext", *options, f"train.gradient_accumulation_steps={accumulation}"))
        assert run is not None
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["learning_rate"] for line in lines] == pytest.approx([0, 0.0025, 0.005, 0.0075])
        assert sorted(int(path.name.rsplit("-", 1)[1]) for path in run.glob("checkpoint-*")) == [2, 4]


def test_epochs_end_training_when_they_come_first(configure: Configure) -> None:
    run = train(configure("FluxKontext", "train.num_epochs=1", "train.max_train_steps=100", "data.batch_size=2"))
    assert len(losses(run)) == 4  # batches of 2 out of 4, 2 and 1 rows of three geometries: 2 + 1 + 1


def test_gradient_checkpointing_changes_nothing_but_memory(configure: Configure) -> None:
    plain = train(configure("FluxKontext", "train.max_train_steps=5"))
    recomputed = train(configure("FluxKontext", "train.max_train_steps=5", "train.gradient_checkpointing=true"))
    assert plain != recomputed, "a version of fewer than 5 steps would have made way for the next"
    assert_equal(weights(plain), weights(recomputed))


def test_data_workers_change_nothing(configure: Configure) -> None:
    alone = train(configure("FluxKontext", "train.max_train_steps=5"))
    options = ("train.max_train_steps=5", "data.num_workers=2", "data.persistent_workers=true")
    workers = train(configure("FluxKontext", *options))
    assert_equal(weights(alone), weights(workers))


# Two families stand for all, whose loop and objective are the same code, and each for one way of training.
@pytest.mark.parametrize("name,mode,share", [("FluxKontext", "full", 0.1), ("QwenImageEdit", "lora", 0.5)])
def test_one_pair_can_be_overfitted(
    name: str, mode: str, share: float, configure: Configure, tmp_path: Path, write_pairs: Callable[..., Path]
) -> None:
    """The loss of one pair at fixed noise falls by 90 % (full) or half (LoRA on every linear) in 50 steps."""
    pair = write_pairs(tmp_path / "one", [(64, 64)])
    from qwen_image_finetune import flow

    fixed = flow.draw(["fixed"], [0], 0, (16, 8, 8), "uniform", 1.0)
    lora = ("model.lora.target_modules=all-linear", "model.lora.r=16", "model.lora.lora_alpha=16")
    options = ("model.lora=null", "optimizer.init_args.lr=0.002") if mode == "full" else lora
    config = configure(name, f"data.init_args.dataset_path={pair}", "train.max_train_steps=50", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "draw", lambda *arguments, **named: fixed)
        curve = losses(train(config))
    assert curve[-1] < share * curve[0]


def test_non_finite_loss_is_not_learnt_from_and_stops_the_run(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwen_image_finetune import flow
    from qwen_image_finetune.training.train import TrainingStopped

    whole = flow.loss
    calls = {"count": 0}

    def poisoned(*arguments: object, **named: object) -> Tensor:
        calls["count"] += 1
        loss = whole(*arguments, **named)  # type: ignore[arg-type]
        return loss * float("nan") if calls["count"] >= 5 else loss

    config = configure("FluxKontext", "train.max_train_steps=20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "loss", poisoned)
        with pytest.raises(TrainingStopped, match="weights of step 4 are saved"):
            train(config)
    said = capsys.readouterr().out
    assert said.count("not learnt from") == 3
    run = config.logging.project_dir / "v0"
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    four = train(configure("FluxKontext", "train.max_train_steps=4", "logging.tracker_project_name=four"))
    assert_equal(weights(run), weights(four))


@pytest.mark.parametrize(
    "options, seconds",
    [
        ((), 20),
        (("train.compile=true",), 1800),
        (("cache.use_cache=false",), 1800),
        (("train.compile=true", "train.collective_timeout=30"), 30),
    ],
)
def test_where_steps_of_processes_differ_they_wait_for_each_other(
    options: tuple[str, ...], seconds: int, configure: Configure
) -> None:
    """Each compiles the sizes that it meets, while the others have nothing to do."""
    assert patience(configure("FluxKontext", *options)).total_seconds() == seconds
