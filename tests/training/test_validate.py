"""Validation sees what training does not, and training does not see validation."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.disk import history
from qwen_image_finetune.encoding.pairs import needed, open_pairs
from qwen_image_finetune.families import get_family
from qwen_image_finetune.training.state import State
from qwen_image_finetune.training.train import train
from qwen_image_finetune.training.trained import exact
from qwen_image_finetune.training.verdict import Best, Measured
from tests.kin import TWO

Configure = Callable[..., Config]


@pytest.fixture(scope="session")
def held_out(build_once: Callable[[str, Callable[[Path], object]], Path], write_pairs: Callable[..., Path]) -> Path:
    """Three pairs like those of training, of other pictures."""
    return build_once("held-out-pairs", lambda folder: write_pairs(folder, [(64, 64), (96, 64), (64, 64)], seed=9))


def weights(run: Path | None) -> dict[str, Tensor]:
    assert run is not None
    folder = max(run.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return exact(folder)


def lines(run: Path | None, name: str) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that have the value `name`."""
    assert run is not None
    text = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if name in line]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def rounds(folder: Path | None, **more: object) -> str:
    fewest = {"steps": 2, "num_validation_samples": 1, "num_inference_steps": 1, "num_loss_sigmas": 2}
    settings = {"enabled": True, **fewest, **more}
    return f"validation={json.dumps(settings if folder is None else {**settings, 'dataset_path': str(folder)})}"


MODES = [(name, "cached") for name in TWO] + [("FluxKontext", mode) for mode in ("uncached", "workers", "full")]


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_weights_are_the_same_with_and_without(name: str, mode: str, configure: Configure, held_out: Path) -> None:
    """Rounds in the middle of an epoch (7 rows, batches of 2), with dropout of everything that can be dropped."""
    options = [
        "train.max_train_steps=7",
        "data.batch_size=2",
        "data.init_args.caption_dropout_rate=0.3",
        "data.init_args.prompt_image_dropout_rate=0.3",
        f"cache.use_cache={json.dumps(mode != 'uncached')}",
        "model.lora=null" if mode == "full" else "model.lora.lora_dropout=0.2",
    ]
    if mode == "workers":
        options += ["data.num_workers=2", "data.persistent_workers=true"]
    if mode == "full":
        options += ["optimizer.init_args.lr=0.001"]
    plain = train(configure(name, *options))
    validated = train(configure(name, *options, rounds(held_out)))
    assert_equal(weights(plain), weights(validated))
    assert lines(plain, "loss") != [] and [line["loss"] for line in lines(plain, "loss")] == [
        line["loss"] for line in lines(validated, "loss")
    ]
    assert [line["step"] for line in lines(validated, "held_out_loss")] == [2, 4, 6, 7]
    assert lines(validated, "held_out_difference")[-1]["held_out_difference"] != 0


def test_a_share_is_not_trained_on(configure: Configure, pairs: Path, tmp_path: Path) -> None:
    """Training with a share held out equals training on a folder that never had those rows."""
    options = ("train.max_train_steps=6", "data.batch_size=2")
    config = configure("FluxKontext", *options, rounds(None, share=0.3))
    split = open_pairs(config, get_family("FluxKontext"))
    assert split.held_out is not None
    keys = {row.key for row in split.held_out.rows}
    assert len(keys) == 2 and len(split.training) == 5 and keys.isdisjoint(row.key for row in split.training.rows)
    rest = Path(shutil.copytree(pairs, tmp_path / "rest"))
    for key in keys:
        for file in [*rest.rglob(f"{key}.png"), *rest.rglob(f"{key}.txt")]:
            file.unlink()
    validated = train(config)
    alone = train(configure("FluxKontext", *options, f"data.init_args.dataset_path={rest}"))
    assert_equal(weights(validated), weights(alone))


def test_pairs_that_are_trained_on_are_not_held_out(
    configure: Configure, pairs: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = Path(shutil.copytree(held_out, tmp_path / "mixed"))
    for part in ("control_images", "training_images"):
        shutil.copy(pairs / part / "0.png", mixed / part / "known.png")
    (mixed / "training_images" / "known.txt").write_text("an edit that is trained on")
    family = get_family("FluxKontext")
    split = open_pairs(configure("FluxKontext", rounds(mixed)), family)
    assert split.held_out is not None and {row.key for row in split.held_out.rows} == {"0", "1", "2"}
    assert "1 of 4 held-out pairs are left out" in capsys.readouterr().out
    with pytest.raises(DataError, match="every input of it is also trained on"):
        open_pairs(configure("FluxKontext", rounds(pairs)), family)
    with pytest.raises(ConfigError, match="exclude each other"):
        configure("FluxKontext", rounds(pairs, share=0.5))


# Three runs with validation each: two families stand for all, whose loss and sampler are the same code.
@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_the_loss_of_the_base_is_that_of_the_untouched_model(name: str, configure: Configure, held_out: Path) -> None:
    """A LoRA at strength 0, after a start from trained values, and a model tuned as a whole, before its first step."""
    options = ("train.max_train_steps=5", rounds(held_out, steps=3))
    first = train(configure(name, *options, "logging.tracker_project_name=first"))
    assert first is not None
    lora = next(first.glob("checkpoint-*-5")) / "pytorch_lora_weights.safetensors"
    again = train(configure(name, *options, f"model.lora.pretrained_weight={lora}", "optimizer.init_args.lr=0.0"))
    whole = train(configure(name, *options, "model.lora=null", "optimizer.init_args.lr=0.0"))
    assert again is not None and whole is not None
    base = [json.loads((run / "samples" / "base.json").read_text())["losses"] for run in (first, again, whole)]
    assert base[0] == base[1]
    assert base[0] == pytest.approx(base[2], rel=1e-6)
    assert [line["held_out_difference"] for line in lines(whole, "held_out_loss")] == [0, 0]
    trained = lines(first, "held_out_loss")[-1]["held_out_loss"]
    assert lines(again, "held_out_loss")[-1]["held_out_loss"] == pytest.approx(trained, rel=1e-4)
    pictures = [(run / "samples" / "base" / "0.png").read_bytes() for run in (first, again)]
    assert pictures[0] == pictures[1]


def test_a_resumed_run_goes_on_with_its_base_and_its_best(configure: Configure, held_out: Path) -> None:
    tuned = ("model.lora=null", "optimizer.init_args.lr=0.0001")
    options = ("train.checkpointing_steps=2", "train.resume_from_checkpoint=latest", rounds(held_out), *tuned)
    stopped = train(configure("FluxKontext", *options, "train.max_train_steps=5"))
    workers = "data.num_workers=1"  # how pairs are read is no matter of what the base makes of them
    resumed = train(configure("FluxKontext", *options, "train.max_train_steps=7", workers))
    whole = train(configure("FluxKontext", *options, "train.max_train_steps=7", "logging.tracker_project_name=whole"))
    assert stopped == resumed and resumed is not None and whole is not None
    same = [line for line in lines(resumed, "held_out_loss") if line["step"] != 5]  # its last step was saved as well
    assert same == lines(whole, "held_out_loss")
    assert (resumed / history.BEST).read_text() == (whole / history.BEST).read_text()
    best = json.loads((whole / history.BEST).read_text())
    assert best["held_out_loss"] == min(line["held_out_loss"] for line in lines(whole, "held_out_loss"))
    assert (whole / best["checkpoint"]).is_dir()


def test_only_what_stands_there_is_pointed_to(
    configure: Configure, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a checkpoint takes to write: one that a kill ends is never the best."""
    write, offer, there = State.write, Best.offer, list[bool]()

    def slow(self: State, folder: Path, snapshot: dict[str, Any]) -> None:
        time.sleep(1)
        write(self, folder, snapshot)

    def looking(self: Best, now: Measured, base: Measured | None, checkpoint: Path | None) -> None:
        there.append(checkpoint is None or checkpoint.is_dir())
        offer(self, now, base, checkpoint)

    monkeypatch.setattr(State, "write", slow)
    monkeypatch.setattr(Best, "offer", looking)
    train(configure("FluxKontext", "train.checkpointing_steps=2", "train.max_train_steps=4", rounds(held_out)))
    assert there == [True, True]


def test_strips_say_what_is_where(configure: Configure, held_out: Path) -> None:
    run = train(configure("QwenImageEdit", "train.max_train_steps=5", rounds(held_out)))
    assert run is not None
    (strip,) = json.loads((run / "samples" / "step-4" / "layout.json").read_text())
    assert [line["step"] for line in lines(run, "sample_psnr")] == [2, 4]
    assert [part["name"] for part in strip["parts"]] == ["reference", "base", "drawn", "truth"]
    assert strip["prompt"] == "edit number 0"
    from PIL import Image

    picture = Image.open(run / "samples" / "step-4" / "0.png")
    base = strip["parts"][1]
    cut = picture.crop((base["left"], 0, base["left"] + base["width"], picture.height))
    assert cut.tobytes() == Image.open(run / "samples" / "base" / "0.png").tobytes()
    pixels = {part["name"]: part["left"] for part in strip["parts"]}
    wide = strip["parts"][2]["width"]
    drawn, truth = (picture.crop((pixels[name], 0, pixels[name] + wide, picture.height)) for name in ("drawn", "truth"))
    difference = np.asarray(drawn, dtype=float) - np.asarray(truth, dtype=float)
    assert lines(run, "sample_psnr")[-1]["sample_psnr"] == pytest.approx(
        10 * np.log10(255**2 / np.mean(difference**2)), abs=1e-4
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_samples_are_what_prediction_draws(configure: Configure, held_out: Path, precision: str) -> None:
    import numpy as np
    from PIL import Image

    from qwen_image_finetune.trainer import Trainer

    overrides = ("train.max_train_steps=1", f"train.mixed_precision={precision}")
    config = configure("FluxKontext", *overrides, rounds(held_out, num_inference_steps=8, seed=5, num_loss_pairs=0))
    run = train(config)
    assert run is not None
    trainer = Trainer(config)
    reference = Image.open(held_out / "control_images" / "0.png")
    predicted = trainer.predict(reference, "edit number 0", 8, config.validation.guidance_scale, seed=5)[0]
    drawn = Image.open(run / "samples" / "base" / "0.png")
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(predicted).astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_half_precision_draws_a_model_trained_as_a_whole(name: str, configure: Configure, held_out: Path) -> None:
    """Its weights are float32, what the encoders hand on is cast. Training so needs a card, drawing does not."""
    import numpy as np

    from qwen_image_finetune import loading
    from qwen_image_finetune.drawing.samples import Sampler
    from qwen_image_finetune.encoding.cache import EncodedDataset

    def drawn(precision: str) -> Any:
        config = configure(name, "model.lora=null", f"train.mixed_precision={precision}", rounds(held_out))
        family, cpu = get_family(name), torch.device("cpu")
        folder, dtype = loading.checkpoint_folder(config, family), loading.encoder_dtype(precision)
        pairs = open_pairs(config, family).held_out
        assert pairs is not None
        rows = EncodedDataset(config, family, needed(config, pairs), folder, dtype, trained_on=False)
        pipe = loading.load_encoders(family, folder, dtype, {"default": cpu})
        model: Any = family.transformer
        transformer = model.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
        return np.asarray(Sampler(config, rows, pipe, transformer, cpu).draw("", False, lambda: None)[0]).astype(int)

    assert np.abs(drawn("fp16") - drawn("no")).mean() < 2


def test_levels_are_stratified_and_noise_is_fixed(configure: Configure, held_out: Path) -> None:
    from dataclasses import dataclass

    from qwen_image_finetune.records import Encoded
    from qwen_image_finetune.training.held_out_loss import HeldOutLoss

    @dataclass
    class Flat:
        """What the levels depend on."""

        train = configure("FluxKontext", "train.sigma_distribution=uniform").train
        weighting = configure("FluxKontext").loss

        def shift(self, shape: object) -> float:
            return 1.0

    settings = configure("FluxKontext", rounds(held_out, num_loss_sigmas=5)).validation
    measure = HeldOutLoss(Flat(), settings)  # type: ignore[arg-type]

    def row(key: str) -> Encoded:
        return Encoded(key, torch.zeros(4, 2, 2), (), {})

    levels, noise = measure.draw(row("a"))
    assert [int(level * 5) for level in levels] == [0, 1, 2, 3, 4]
    assert all(torch.equal(one, other) for one, other in zip(measure.draw(row("a")), (levels, noise), strict=True))
    assert not torch.equal(measure.draw(row("b"))[0], levels) and not torch.equal(noise[0], noise[1])
