"""Rows that cannot be read: left out up to a share, listed, the same ones in every run."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_image_finetune.cli import main
from qwen_image_finetune.config import Config
from qwen_image_finetune.data import left_out
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.encoding.pairs import open_pairs
from qwen_image_finetune.families import get_family
from qwen_image_finetune.training.train import train

Configure = Callable[..., Config]
BAD = {
    "1": "training_images/1.png: no caption",
    "2": "control_images/2.png: damaged",
    "x": "training_images/x.txt: a caption without a picture",
}


@pytest.fixture
def damaged(pairs: Path, tmp_path: Path) -> Path:
    """Seven pairs: one without its caption, one damaged behind its header; and a caption without its picture."""
    folder = Path(shutil.copytree(pairs, tmp_path / "damaged"))
    (folder / "training_images/1.txt").unlink()
    picture = folder / "control_images/2.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    (folder / "training_images/x.txt").write_text("nothing to see")
    return folder


@pytest.fixture
def rest(pairs: Path, tmp_path: Path) -> Path:
    """The same without them."""
    folder = Path(shutil.copytree(pairs, tmp_path / "rest"))
    for stem in ("1", "2"):
        for file in [*folder.rglob(f"{stem}.png"), *folder.rglob(f"{stem}.txt")]:
            file.unlink()
    return folder


def test_up_to_a_share(configure: Configure, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of eight."""
    data, family = f"data.init_args.dataset_path={damaged}", get_family("FluxKontext")
    training = open_pairs(configure("FluxKontext", data, "data.max_bad_share=0.375"), family).training
    assert [row.key for row in training.rows] == ["0", "3", "4", "5", "6"]
    assert {row.key for row in training.left_out} == set(BAD)
    assert "3 of 8 rows are left out" in capsys.readouterr().out
    for most in (0, 0.37):
        with pytest.raises(DataError) as refused:
            open_pairs(configure("FluxKontext", data, f"data.max_bad_share={most}"), family)
        for reason in BAD.values():
            assert reason.split(":")[0] in str(refused.value)
    (damaged / "control_images_1").write_text("no folder")
    with pytest.raises(
        DataError, match="control_images_1: a file, not a folder"
    ):  # of no row: nothing is left out for it
        open_pairs(configure("FluxKontext", data, "data.max_bad_share=1"), family)


def run_of(configure: Configure, folder: Path, name: str, *more: str) -> Path:
    options = ("train.max_train_steps=4", "train.checkpointing_steps=2", "data.batch_size=2")
    given = (f"data.init_args.dataset_path={folder}", f"logging.tracker_project_name={name}")
    version = train(configure("FluxKontext", *options, *given, *more))
    assert version is not None
    return version


def weights(version: Path) -> dict[str, torch.Tensor]:
    return load_file(next(version.glob("checkpoint-*-4")) / "pytorch_lora_weights.safetensors")


def test_training_is_that_on_the_others_alone(
    configure: Configure, damaged: Path, rest: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the cache and without; a resume has the same rows, also where some can be read by then."""
    alone = run_of(configure, rest, "alone")
    assert not (alone / left_out.FILE).exists()
    some = "data.max_bad_share=0.4"
    whole = run_of(configure, damaged, "cached", some)
    uncached = run_of(configure, damaged, "uncached", some, "cache.use_cache=false")
    listed = left_out.read(whole)
    assert {row.key: row.reasons[0].removeprefix(f"{damaged}/").split(":")[0] for row in listed} == {
        key: reason.split(":")[0] for key, reason in BAD.items()
    }
    assert len((whole / left_out.FILE).read_text().splitlines()) == 3 and left_out.read(uncached) == listed
    for version in (whole, uncached):
        for name, value in weights(alone).items():
            assert torch.equal(weights(version)[name], value), name

    shutil.copy(pairs / "training_images/1.txt", damaged / "training_images/1.txt")
    shutil.rmtree(next(whole.glob("checkpoint-*-4")))
    capsys.readouterr()
    resumed = run_of(configure, damaged, "cached", some, "train.resume_from_checkpoint=latest")
    said = capsys.readouterr().out
    assert resumed == whole and "rows that can be read now stay left out, as when the run began: 1\n" in said
    assert "the data is not" not in said and {row.key for row in left_out.read(resumed)} == set(BAD)
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(alone).items())

    (damaged / "control_images/3.png").unlink()
    data = f"data.init_args.dataset_path={damaged}"
    open_pairs(configure("FluxKontext", data, "data.max_bad_share=0.5"), get_family("FluxKontext"), before=listed)
    said = capsys.readouterr().out
    assert f"rows that the run had when it began are left out now: 3: {damaged}/training_images/3.png: no ref" in said


def test_check_lists_them(
    configure: Configure, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("FluxKontext")
    words = [str(tmp_path / "config.yaml"), f"data.init_args.dataset_path={damaged}", "data.max_bad_share=0.4"]
    assert main(["check", *words]) == 0
    said = capsys.readouterr().out
    assert "3 of 8 rows are left out" in said and "5 pairs, all readable" in said
    assert [line[:12] for line in said.splitlines() if line.startswith("left out: ")] == [
        f"left out: {key}:" for key in ("1", "x", "2")
    ]


def test_rows_of_tables_and_shards(pairs: Path, tmp_path: Path, configure: Configure) -> None:
    """A line that names no picture; a sample whose source is none; keys begin with the data set's name."""
    table = Path(shutil.copytree(pairs, tmp_path / "table"))
    names = [("training_images/0.png", "control_images/0.png"), ("training_images/9.png", "control_images/1.png")]
    lines = [json.dumps({"image": target, "control": source, "prompt": "a hat"}) for target, source in names]
    (table / "metadata.jsonl").write_text("\n".join(lines))
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for number in range(2):
            whole = (pairs / "control_images/0.png").read_bytes()
            for name, data in (("source.png", b"none" if number else whole), ("target.png", whole), ("txt", b"a hat")):
                about = tarfile.TarInfo(f"{number}.{name}")
                about.size = len(data)
                shard.addfile(about, io.BytesIO(data))
    (tmp_path / "shards").mkdir()
    (tmp_path / "x.tar").rename(tmp_path / "shards/x.tar")
    columns = "{target: target, references: source, prompt: txt}"
    paths = f"data.init_args.dataset_path=[{table}, {{path: {tmp_path}/shards, columns: {columns}}}]"
    home = f"data.init_args.shards_dir={tmp_path}/known"
    for _ in range(2):  # read, and known
        config = configure("FluxKontext", paths, home, "data.max_bad_share=0.5")
        training = open_pairs(config, get_family("FluxKontext")).training
        assert [row.key for row in training.rows] == ["table/training_images/0.png", "shards/x.tar/0"]
        assert [row.key for row in training.left_out] == ["table/metadata.jsonl, line 2", "shards/x.tar/1"]
