"""A run knows the content of its data, and a resume says what changed, however well the names are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qwen_image_finetune.config import Config
from qwen_image_finetune.training.train import train

Configure = Callable[..., Config]


def test_a_resume_says_what_changed(
    configure: Configure, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(pairs, tmp_path / "data"))
    options = (f"data.init_args.dataset_path={data}", "train.resume_from_checkpoint=latest")

    def resumed(steps: int, *more: str) -> str:
        train(configure("FluxKontext", *options, f"train.max_train_steps={steps}", *more))
        return capsys.readouterr().out

    resumed(1)
    shutil.copytree(data, tmp_path / "moved")
    assert "the data is not" not in resumed(2, f"data.init_args.dataset_path={tmp_path / 'moved'}"), "the same pairs"

    (data / "training_images" / "1.txt").write_text("another word")
    picture = data / "control_images" / "2.png"
    times = picture.stat()
    Image.new("RGB", Image.open(picture).size, "red").save(picture)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    for part in ("control_images", "training_images"):
        (data / part / "6.png").rename(data / part / "7.png")
    (data / "training_images" / "6.txt").rename(data / "training_images" / "7.txt")
    said = resumed(3)
    assert "the data is not what" in said
    assert "1 other captions (1), 1 other pictures (2), 1 new (7), 1 gone (6)" in said
    assert "the data is not" not in resumed(4), "it is said once"

    copied = shutil.copytree(next(tmp_path.glob("output/project/v0/checkpoint-*-4")), tmp_path / "checkpoint-0-4")
    (data / "training_images" / "1.txt").write_text("a third word")
    elsewhere = ("logging.tracker_project_name=other", f"train.resume_from_checkpoint={copied}")
    assert "pictures, captions, names or their order changed" in resumed(5, *elsewhere)
