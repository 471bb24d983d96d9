"""Evaluation: every candidate draws as prediction would, and every number is that of the pictures it wrote."""

from __future__ import annotations

import csv
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.data.images import resize
from qwen_image_finetune.disk.versions import RunError
from qwen_image_finetune.encoding import remembered
from qwen_image_finetune.encoding.pairs import open_dataset, open_pairs
from qwen_image_finetune.families import get_family
from qwen_image_finetune.judging import metrics
from qwen_image_finetune.judging.evaluate import encode, evaluate, folder_names
from qwen_image_finetune.judging.request import EvaluationError, Request, open_request
from qwen_image_finetune.lora.header import LoraFileError
from qwen_image_finetune.trainer import Trainer
from qwen_image_finetune.training.train import train
from tests.kin import TWO

Configure = Callable[..., Config]


@pytest.fixture
def squares(tmp_path: Path, write_pairs: Callable[..., Path]) -> Path:
    return write_pairs(tmp_path / "squares", [(64, 64)] * 3, seed=5)


def opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("name", TWO)
def test_a_sweep_over_checkpoints_and_strengths(name: str, configure: Configure, squares: Path, tmp_path: Path) -> None:
    config = configure(name, "train.max_train_steps=6", "train.checkpointing_steps=3")
    run = train(config)
    assert run is not None
    words = ["--checkpoints", "all", "--strength", "0", "1", "--steps", "2", "--guidance", "1", "--count", "2"]
    assert main(["evaluate", str(run), str(squares), *words]) == 0
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())
    by_name = {one["name"]: one for one in written["candidates"]}
    checkpoints = sorted(path.name for path in run.glob("checkpoint-*"))
    sweep = [f"{each} x {strength}" for each in checkpoints for strength in (0, 1)]
    assert list(by_name) == ["base", "copy of the input", *sweep]

    def picture(candidate: str, place: int) -> np.ndarray:
        return opened(run / "evaluation" / by_name[candidate]["pictures"][place]["file"])

    for each in checkpoints:
        assert np.array_equal(picture(f"{each} x 0", 0), picture("base", 0)), "strength 0 is the base"
        assert not np.array_equal(picture(f"{each} x 1", 0), picture("base", 0))
    trainer = Trainer(config)
    trainer.load_lora(run / checkpoints[-1])
    for place, row in enumerate(by_name["base"]["pictures"]):
        reference = Image.open(squares / "control_images" / f"{row['key']}.png")
        predicted = trainer.predict(reference, row["prompt"], 2, guidance_scale=1.0, seed=place)[0]
        difference = np.abs(np.asarray(predicted.convert("RGB")).astype(int) - picture(sweep[-1], place))
        assert difference.max() <= 1, "drawn as prediction draws"
        assert np.array_equal(picture("copy of the input", place), np.asarray(reference))

    row = by_name["base"]["pictures"][1]
    truth = metrics.pixels(Image.open(squares / "training_images" / f"{row['key']}.png"))
    assert row["psnr"] == pytest.approx(metrics.psnr(picture("base", 1) / 255, truth))
    values = [one["psnr"] for one in by_name["base"]["pictures"]]
    assert by_name["base"]["means"]["psnr"]["mean"] == pytest.approx(np.mean(values))
    assert by_name["base"]["difference_from_base"]["ssim"]["mean"] == 0
    difference = by_name[sweep[-1]]["difference_from_base"]["psnr"]["mean"]
    assert difference == pytest.approx(by_name[sweep[-1]]["means"]["psnr"]["mean"] - np.mean(values))
    with open(run / "evaluation" / "evaluation.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(by_name)
    assert float(lines[1]["psnr"]) == row["psnr"] and lines[1]["key"] == row["key"]


def test_pairs_without_masks_evaluate_a_run_that_was_trained_with_them(
    configure: Configure, squares: Path, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    masked = write_pairs(tmp_path / "masked", [(64, 64)] * 2, masks=True)
    options = (f"data.init_args.dataset_path={masked}", "data.init_args.use_edit_mask=true", "loss.mask_loss=true")
    run = train(configure("FluxKontext", "train.max_train_steps=5", *options))
    assert run is not None
    for folder, read in ((squares, False), (masked, True)):
        request = Request(run, folder, steps=1, count=1, output=tmp_path / "evaluated")
        (picture,) = evaluate(request)["candidates"][0]["pictures"]
        source, truth = (
            metrics.pixels(Image.open(tmp_path / "evaluated" / each / "0.png")) for each in ("input", "truth")
        )
        region = metrics.edited_region(source, truth)
        if read:
            region = np.tile(np.arange(64) < 32, (64, 1))
        drawn = metrics.pixels(Image.open(tmp_path / "evaluated" / picture["file"]))
        assert picture["change_inside"] == metrics.measure(drawn, truth, source, region)["change_inside"]


def test_a_transformer_tuned_as_a_whole(configure: Configure, squares: Path, tmp_path: Path) -> None:
    options = ("train.max_train_steps=5", "model.lora=null", "optimizer.init_args.lr=0.001")
    run = train(configure("FluxKontext", *options))
    assert run is not None
    found = evaluate(Request(run, squares, steps=1, guidance=1.0, count=1))
    names = [one["name"] for one in found["candidates"]]
    assert names == ["base", "copy of the input", next(run.glob("checkpoint-*")).name]
    assert found["candidates"][0]["means"]["psnr"] != found["candidates"][2]["means"]["psnr"]


def test_what_cannot_be_evaluated_is_said(configure: Configure, squares: Path, tmp_path: Path) -> None:
    configure("FluxKontext")
    file = tmp_path / "config.yaml"
    for words, given in {
        "give its version folder": {"checkpoints": ("all",)},
        "at least one picture": {"count": 0},
        "--steps 0: at least 1": {"steps": 0},
        "--steps -1: at least 1": {"steps": -1},
    }.items():
        with pytest.raises(EvaluationError, match=words):
            evaluate(Request(file, squares, **given))  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=r"holds no config\.yaml"):
        evaluate(Request(squares, squares))
    with pytest.raises(LoraFileError, match="does not exist"):
        evaluate(Request(file, squares, lora=("nowhere.safetensors",)))
    (entry,) = open_request(Request(file, "hf://owner/name"))[1].data.init_args.entries
    assert entry.on_hub and entry.path == "hf://owner/name"  # a path of this machine would have lost a slash
    (tmp_path / "v7").mkdir()
    (tmp_path / "v7" / "config.yaml").write_text(file.read_text())
    with pytest.raises(EvaluationError, match="no checkpoint 'best'"):
        evaluate(Request(tmp_path / "v7", squares))


def test_of_a_large_reference_only_the_size_of_the_target_is_kept(
    configure: Configure, write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    large = (201, 203)
    folder = write_pairs(tmp_path / "large", [large] * 2)
    config = configure("FluxKontext", f"data.init_args.dataset_path={folder}")
    predictor = Trainer(config).predictor
    dataset = open_dataset(config, predictor.family)
    rows = encode(config, predictor, dataset, Request(tmp_path / "config.yaml", folder))
    gc.collect()
    kept = [each.size for each in gc.get_objects() if isinstance(each, Image.Image)]
    assert large not in kept
    for row, index in zip(rows, range(2), strict=True):
        reference = Image.open(folder / "control_images" / f"{index}.png")
        assert row.target.size == (64, 64)
        assert np.array_equal(np.asarray(row.source), np.asarray(resize(reference, (64, 64))))


def test_every_candidate_has_a_folder_of_its_own() -> None:
    names = {
        "base": "base",
        "copy of the input": "copy-of-the-input",
        "run x 1": "run-x-1",
        "run x -1": "run-x--1",
        "a/b x 0.5": "a-b-x-0.5",
        "a-b x 0.5": "a-b-x-0.5-2",
        "A b x 0.5": "A-b-x-0.5-3",
        "../checkpoint-3-12 x 1": "checkpoint-3-12-x-1",
        "truth": "truth-2",
        "Input": "Input-2",
        "/": "candidate",
    }
    assert folder_names(list(names)) == list(names.values())


def test_a_run_knows_which_pairs_it_held_out(
    configure: Configure, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their content: whatever they are called, and whatever came to the folder since."""
    folder = Path(shutil.copytree(pairs, tmp_path / "faces"))
    rounds = "validation={enabled: true, share: 0.3, steps: 100, num_loss_pairs: 1, num_validation_samples: 1}"
    where = f"data.init_args.dataset_path={folder}"
    run = train(configure("FluxKontext", where, rounds, "train.max_train_steps=5"))
    assert run is not None
    config, family = load_config(run / "config.yaml"), get_family("FluxKontext")
    split = open_pairs(config, family)
    assert split.held_out is not None and len(split.held_out) == 2, "all of them, however few the rounds measure"
    held_out = [row.key for row in split.held_out.rows]
    one = held_out[0]
    for file in [*folder.glob(f"*/{one}.png"), *folder.glob(f"*/{one}.txt")]:
        file.rename(file.with_stem("another name"))
    for part in ("control_images", "training_images"):
        shutil.copy(folder / part / "another name.png", folder / part / f"{one}.png")
        Image.new("RGB", (64, 64), "red").save(folder / part / "new.png")
    for name in (one, "new"):
        (folder / "training_images" / f"{name}.txt").write_text("edit")
    (folder / "control_images" / f"{one}.png").write_bytes((folder / "control_images" / "new.png").read_bytes())

    assert main(["evaluate", str(run), "--steps", "1", "train.seed=1"]) == 0
    written = json.loads((run / "evaluation" / "evaluation.json").read_text())
    keys = [row["key"] for row in written["candidates"][0]["pictures"]]
    assert sorted(keys) == sorted({*held_out, "another name"} - {one})
    assert written["dataset"] == "held out of training" and not [each for each in written["notes"] if "train" in each]

    capsys.readouterr()
    found = evaluate(Request(run, pairs, steps=1, count=1))
    note = next(each for each in found["notes"] if "trained on" in each)
    assert note.startswith("5 of 7 pairs were trained on") and note in capsys.readouterr().out
    for file in folder.glob("*/another name.*"):
        file.unlink()
    found = evaluate(Request(run, None, steps=1))
    assert found["pictures"] == 1 and "1 of 2 held-out pairs are not there any more" in found["notes"]


def test_held_out_pairs_that_there_are_not(configure: Configure, squares: Path, tmp_path: Path) -> None:
    run = train(configure("FluxKontext", "train.max_train_steps=5"))
    assert run is not None
    with pytest.raises(EvaluationError, match="held no pairs out"):
        evaluate(Request(run, None))
    with pytest.raises(EvaluationError, match="name the folder"):
        evaluate(Request(tmp_path / "config.yaml", None))
    (run / "pairs.json").write_text('{"trained": 1}')
    with pytest.raises(RunError, match=r"pairs\.json is damaged"):
        evaluate(Request(run, squares))
    (run / "pairs.json").unlink()
    assert [note for note in evaluate(Request(run, squares, steps=1, count=1))["notes"] if "pairs" in note] == []


def test_what_was_trained_on_stays_so(configure: Configure, pairs: Path, squares: Path) -> None:
    """A run that goes on with fewer pairs has seen the others all the same."""
    first = train(configure("FluxKontext", "train.max_train_steps=5"))
    again = train(
        configure("FluxKontext", f"data.init_args.dataset_path={squares}", "train.resume_from_checkpoint=latest")
    )
    assert first is not None and again == first
    known = remembered.read(first)
    assert known is not None and known.held_out == ()
    assert len(known.trained) == 7 + 3
