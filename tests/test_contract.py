"""What is promised to users and tested nowhere else; `test_promises` lists every promise with its tests."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from qwen_image_finetune.config import Config
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.families import FAMILIES, get_family, with_targets
from qwen_image_finetune.trainer import Trainer
from qwen_image_finetune.training.train import train
from tests.kin import EDITING, TWO, UNLIKE

TESTS = Path(__file__).parent
Configure = Callable[..., Config]
WritePairs = Callable[..., Path]

# What is compared


@dataclass(frozen=True)
class Outcome:
    """What a run left, read at once: a version of fewer than 5 steps makes way for the next one of its project."""

    version: Path
    losses: list[float]
    weights: dict[str, Tensor]
    lora: Path


def learn(config: Config) -> Outcome:
    version = train(config)
    assert version is not None
    return read_outcome(version)


def read_outcome(version: Path) -> Outcome:
    lora = newest(version) / "pytorch_lora_weights.safetensors"
    lines = map(json.loads, (version / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]  # validation has lines of its own
    return Outcome(version, losses, load_file(lora), lora)


def newest(version: Path) -> Path:
    return max(version.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


# Commands


def test_the_doors_hold_no_logic() -> None:
    """Each door imports and names; only the command line of src.main has a function."""
    for file in (TESTS.parent / "src").rglob("*.py"):
        tree = ast.parse(file.read_text())
        if file.name != "main.py":
            assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr) for node in tree.body), (
                file
            )
        assert len(file.read_text().splitlines()) < 30
    from src.data.config import load_config_from_yaml
    from src.data.dataset import ImageDataset
    from src.flux_kontext_trainer import FluxKontextLoraTrainer
    from src.qwen_image_edit_trainer import QwenImageEditTrainer

    for door in (load_config_from_yaml, ImageDataset, FluxKontextLoraTrainer, QwenImageEditTrainer):
        assert door.__module__.startswith("qwen_image_finetune.")


def test_tensorboard_shows_versions_side_by_side(configure: Configure) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    config = configure("FluxKontext", "logging.report_to=tensorboard", "train.max_train_steps=5")
    train(config)
    train(config)
    shown = EventMultiplexer().AddRunsFromDirectory(str(config.logging.project_dir)).Reload()
    assert set(shown.Runs()) == {"v0", "v1"}
    assert [event.step for event in shown.Scalars("v1", "loss")] == [1, 2, 3, 4, 5]


# Configuration: the model and its adapter


def test_a_named_adapter_and_a_regular_expression(configure: Configure) -> None:
    config = configure("FluxKontext", "model.lora.adapter_name=lora_edit", "train.max_train_steps=1",
                       r"model.lora.target_modules='transformer_blocks\.\d+\.attn\.to_[qv]'")  # fmt: skip
    trained = learn(config).weights
    assert trained
    assert all(key.split(".lora_")[0].rpartition(".")[2] in ("to_q", "to_v") for key in trained)
    assert not [key for key in trained if ".single_transformer_blocks." in key or "lora_edit" in key]


@pytest.mark.parametrize("name", EDITING)
def test_training_starts_from_a_lora_of_any_dialect(name: str, configure: Configure, tmp_path: Path) -> None:
    """One step at learning rate 0 gives back what it started from: our own file, and exports of it."""
    from qwen_image_finetune.lora.export import export

    trained = learn(configure(name, "train.max_train_steps=5"))
    source, expected = trained.lora, trained.weights
    naming = get_family(name).naming
    export(source, tmp_path / "comfy.safetensors", "comfy", naming)
    export(source, tmp_path / "kohya.safetensors", "kohya", naming)
    for start in (source, source.parent, tmp_path / "comfy.safetensors", tmp_path / "kohya.safetensors"):
        options = ("optimizer.class_path=torch.optim.SGD", "optimizer.init_args={lr: 0.0}", "train.max_train_steps=1")
        found = learn(configure(name, *options, f"model.lora.pretrained_weight={start}")).weights
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-7), (start, key)


# Configuration: data


def test_a_dataset_class_of_ones_own(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(
        "from qwen_image_finetune.data.dataset import ImageDataset\n"
        "class Shouted(ImageDataset):\n"
        "    def prompt(self, index):\n"
        "        return super().prompt(index).upper()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = learn(configure("QwenImageEdit", "data.class_path=own_data.Shouted", "train.max_train_steps=2"))
    plain = learn(configure("QwenImageEdit", "train.max_train_steps=2"))
    assert own.losses != plain.losses


def test_several_folders_are_trained_on(configure: Configure, write_pairs: WritePairs, tmp_path: Path) -> None:
    """An epoch visits the rows of both."""
    first = write_pairs(tmp_path / "first", [(64, 64)] * 2)
    second = write_pairs(tmp_path / "second", [(64, 64)] * 3, seed=1)
    options = ("train.num_epochs=1", "train.max_train_steps=null")
    config = configure("FluxKontext", f"data.init_args.dataset_path=[{first}, {second}]", *options)
    assert len(learn(config).losses) == 5


def test_without_shuffle_the_rows_come_in_their_order(
    configure: Configure, write_pairs: WritePairs, tmp_path: Path
) -> None:
    from qwen_image_finetune.encoding.pairs import open_dataset
    from qwen_image_finetune.training.job import plan_batches

    folder = write_pairs(tmp_path / "rows", [(64, 64)] * 5)
    config = configure("FluxKontext", f"data.init_args.dataset_path={folder}", "data.shuffle=false")
    batches = plan_batches(config, open_dataset(config, get_family("FluxKontext")), 1)
    assert [micro.rows[0] for step in range(10) for micro in batches.at(step)] == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize(
    "crop", ["center_crop: true, center_crop_ratio: 0.5", "random_crop: true, crop_size: 48, crop_scale: [0.8, 1.0]"]
)
def test_crops_reach_training(crop: str, configure: Configure, pairs: Path) -> None:
    def run(keys: str, cached: bool = True) -> list[float]:
        arguments = f"data.init_args={{dataset_path: {pairs}, resolution: 64, {keys}}}"
        options = ("train.max_train_steps=3", f"cache.use_cache={cached}")
        return learn(configure("FluxKontext", arguments, *options)).losses

    assert run(crop) != run("center_crop: false")
    assert run(crop) == run(crop, cached=False)  # within the first epoch, a random crop too


@pytest.mark.parametrize("cached", [True, False])
def test_the_mask_weights_the_loss(cached: bool, configure: Configure, write_pairs: WritePairs, tmp_path: Path) -> None:
    """The masks cover half of each picture: the mean of both halves' losses is the loss of the whole."""
    folder = write_pairs(tmp_path / "masked", [(64, 64)] * 3, masks=True)

    def run(*overrides: str) -> float:
        options = (f"data.init_args.dataset_path={folder}", "train.max_train_steps=1", f"cache.use_cache={cached}")
        return learn(configure("FluxKontext", *options, *overrides)).losses[0]

    masked = ("data.init_args.use_edit_mask=true", "loss.mask_loss=true")
    left = run(*masked, "loss.foreground_weight=1", "loss.background_weight=0")
    right = run(*masked, "loss.forground_weight=0", "loss.background_weight=2")
    whole = run()
    assert left != pytest.approx(right, rel=1e-3)
    assert (left + right) / 2 == pytest.approx(whole, rel=1e-5)
    three_to_one = run(*masked, "loss.foreground_weight=3", "loss.background_weight=1")
    assert (3 * left + right) / 4 == pytest.approx(three_to_one, rel=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_a_dropped_prompt_replaces_the_chosen_embeddings(cached: bool, configure: Configure) -> None:
    def run(*overrides: str) -> list[float]:
        options = ("train.max_train_steps=2", f"cache.use_cache={cached}")
        return learn(configure("FluxKontext", *options, *overrides)).losses

    dropped = "data.init_args.caption_dropout_rate=1.0"
    everything = run(dropped)
    named = run(dropped, "cache.prompt_empty_drop_keys=[prompt_embeds, pooled_prompt_embeds]")
    pooled = run(dropped, "cache.prompt_empty_drop_keys=[pooled_prompt_embeds]")
    nothing = run(dropped, "cache.prompt_empty_drop_keys=[]")
    assert named == everything
    assert nothing == run()
    assert pooled not in (everything, nothing)


@pytest.mark.parametrize("cached", [True, False])
def test_three_references_are_cached_trained_and_drawn_with(
    cached: bool, configure: Configure, write_pairs: WritePairs, tmp_path: Path
) -> None:
    folder = write_pairs(tmp_path / "three", [(64, 64), (64, 128)], references=3)
    path = f"data.init_args.dataset_path={folder}"
    config = configure("FluxKontext", path, f"cache.use_cache={cached}", "train.max_train_steps=5")
    outcome = learn(config)
    trainer = Trainer(config)
    trainer.load_lora(outcome.lora)
    files = sorted((folder / "control_images").glob("0*.png"))
    assert len(files) == 3
    pictures = [Image.open(file) for file in files]
    assert trainer.predict(pictures, "edit number 0", 2)[0].size == (64, 64)
    (folder / "control_images" / "0_control_2.png").unlink()
    (folder / "control_images" / "1_control_2.png").unlink()
    assert learn(config).losses != outcome.losses
    with pytest.raises(DataError, match="2 references; this model takes at most 1"):
        train(configure("QwenImageEdit", path))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_captions_alone(
    name: str, configure: Configure, write_pairs: WritePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a folder of references: text to picture, cached and uncached alike."""
    folder = write_pairs(tmp_path / "captions", [(64, 64), (64, 128)], references=0)
    path, dropout = f"data.init_args.dataset_path={folder}", "data.init_args.caption_dropout_rate=0.5"
    cached = learn(configure(name, path, dropout, "train.max_train_steps=5"))
    assert "training on captions alone" in capsys.readouterr().out
    uncached = learn(configure(name, path, dropout, "train.max_train_steps=5", "cache.use_cache=false"))
    assert cached.losses == uncached.losses
    trainer = Trainer(configure(name, path))
    trainer.load_lora(cached.lora)
    assert trainer.predict(None, "edit number 0", 2, width=64, height=64)[0].size == (64, 64)


# Configuration: the loop


def test_bf16_trains_float32_adapters(configure: Configure) -> None:
    half = learn(configure("QwenImageEdit", "train.mixed_precision=bf16", "train.max_train_steps=2"))
    exact = learn(configure("QwenImageEdit", "train.max_train_steps=2"))
    assert {tensor.dtype for tensor in half.weights.values()} == {torch.float32}
    assert half.losses == pytest.approx(exact.losses, rel=0.05) and half.losses != exact.losses


def test_gradients_are_clipped(configure: Configure) -> None:
    """SGD at learning rate 1 moves by the gradient itself, so by no more than its largest norm."""

    def run(norm: float) -> float:
        options = (
            "optimizer.class_path=torch.optim.SGD",
            "optimizer.init_args={lr: 1.0}",
            "train.checkpointing_steps=1",
        )
        version = train(configure("FluxKontext", *options, f"train.max_grad_norm={norm}", "train.max_train_steps=2"))
        assert version is not None
        first, second = (
            load_file(next(version.glob(f"checkpoint-*-{n}")) / "pytorch_lora_weights.safetensors") for n in (1, 2)
        )
        return float(sum((second[name] - first[name]).square().sum() for name in first) ** 0.5)

    free = run(1e6)
    assert run(free / 10) == pytest.approx(free / 10, rel=1e-3) and free > 0


def test_the_oldest_checkpoints_go(configure: Configure) -> None:
    options = ("train.checkpointing_steps=2", "train.checkpoints_total_limit=2", "train.max_train_steps=7")
    run = train(configure("FluxKontext", *options))
    assert run is not None
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-0-6", "checkpoint-0-7"]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", TWO)
def test_low_memory_changes_nothing_but_memory(name: str, cached: bool, configure: Configure) -> None:
    options = ("train.max_train_steps=3", f"cache.use_cache={cached}")
    frugal, plain = learn(configure(name, *options, "train.low_memory=true")), learn(configure(name, *options))
    assert_equal(frugal.weights, plain.weights)


def test_an_incomplete_cache_is_completed_and_said(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure("FluxKontext", "train.max_train_steps=1", f"cache.cache_dir={tmp_path / 'cache'}")
    first = learn(config).losses
    assert "lacks 7 texts and 14 pictures of 21 entries" in capsys.readouterr().out
    entries = sorted(
        path for path in Path(config.cache.cache_dir).rglob("*") if path.is_file() and len(path.stem) == 64
    )
    assert len(entries) == 21
    for entry in entries[::7]:
        entry.unlink()
    assert learn(config).losses == first
    assert "of 21 entries: encoding them" in capsys.readouterr().out
    train(config)
    assert "is complete: 21 entries" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "cached"), [*((name, True) for name in UNLIKE), *((name, False) for name in TWO)])
def test_validation_draws_samples_and_changes_nothing(name: str, cached: bool, configure: Configure) -> None:
    options = ("train.max_train_steps=4", "model.lora.lora_dropout=0.2", f"cache.use_cache={cached}")
    samples = "{enabled: true, validation_steps: 2, num_validation_samples: 2, num_inference_steps: 2}"
    trackers = ("logging.report_to=tensorboard", "logging.tracker_project_name=drawn")
    run = learn(configure(name, *options, *trackers, f"validation={samples}"))
    plain = learn(configure(name, *options))
    assert run.losses == plain.losses
    assert_equal(run.weights, plain.weights)
    drawn = run.version
    files = sorted(path.relative_to(drawn).as_posix() for path in drawn.glob("samples/step-*/*.png"))
    assert files == [f"samples/step-{step}/{place}.png" for step in (2, 4) for place in (0, 1)]
    strip = Image.open(drawn / files[0])
    assert strip.size == (4 * 64, 64)  # reference, what the base draws, drawing, truth
    assert np.asarray(strip.crop((128, 0, 192, 64))).std() > 1
    assert (drawn / files[0]).read_bytes() != (drawn / files[2]).read_bytes(), "the model has learnt in between"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "samples/0" in EventAccumulator(str(drawn)).Reload().Tags()["images"]


# Outputs


def test_what_a_version_holds(configure: Configure) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from qwen_image_finetune.config import load_config

    config = configure(
        "FluxKontext", "logging.report_to=tensorboard", "train.checkpointing_steps=5", "train.max_train_steps=8"
    )
    run = train(config)
    assert run is not None
    assert run == config.logging.project_dir / "v0"
    (events,) = run.glob("events.out.tfevents.*")
    assert load_config(run / "config.yaml") == with_targets(config, get_family("FluxKontext"))

    shown = EventAccumulator(str(events)).Reload()
    tags = shown.Tags()
    assert {"loss", "grad_norm", "learning_rate"} <= set(tags["scalars"])
    assert [event.value for event in shown.Scalars("loss")] == pytest.approx(read_outcome(run).losses)
    assert "config/text_summary" in tags["tensors"]
    assert (
        config.model.pretrained_model_name_or_path.encode()
        in shown.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    )
    (histogram,) = shown.Histograms("sigma")
    assert histogram.histogram_value.num == 8 and 0 < histogram.histogram_value.min < histogram.histogram_value.max < 1

    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-0-5",
        "checkpoint-1-8",
    ]  # 7 rows an epoch
    for folder in run.glob("checkpoint-*"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert (folder / "pytorch_lora_weights.safetensors") in files
        assert {path.suffix for path in files} <= {".safetensors", ".json"}
        for path in files:
            start = path.read_bytes()[:16]
            assert not start.startswith((b"\x80", b"PK")), f"{path} is a pickle or an archive"


def test_no_tracker_writes_no_events(configure: Configure) -> None:
    run = train(configure("FluxKontext", "logging.report_to=none", "train.max_train_steps=1"))
    assert run is not None
    assert not list(run.rglob("events.out.*"))


# Python


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_trainer_classes_cache_fit_and_predict(name: str, configure: Configure, pairs: Path) -> None:
    from qwen_image_finetune import trainer as module
    from qwen_image_finetune.config import ConfigError

    classes = {"FluxKontext": module.FluxKontextLoraTrainer, "QwenImageEdit": module.QwenImageEditTrainer}
    trainer = classes[name](configure(name, "train.max_train_steps=2"))
    trainer.cache()
    run = trainer.fit()
    trainer.setup_predict()
    assert run is not None
    trainer.load_lora(newest(run))
    reference = Image.open(pairs / "control_images" / "0.png")
    drawn = trainer.predict(
        prompt_image=reference, prompt="edit number 0", num_inference_steps=2, guidance_scale=2.0, seed=1
    )
    assert [picture.size for picture in drawn] == [(64, 64)]
    other = next(family for family in classes if family != name)
    with pytest.raises(ConfigError, match=f"trains {other}, but .* says {name}"):
        classes[other](trainer.config)
