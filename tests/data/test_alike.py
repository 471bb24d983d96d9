"""Pictures that look alike are found, and never stand on both sides of a split."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from qwen_image_finetune.config import DatasetArguments
from qwen_image_finetune.data import alike, hashes
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.part import Part, spread

ROOT = Path(__file__).parents[2]


def open_folder(folder: Path) -> ImageDataset:
    return ImageDataset(
        DatasetArguments(dataset_path=str(folder)), lambda width, height, area, references: (64, 64), 16, 4
    )


def photograph(seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((96, 64), Image.Resampling.BICUBIC)


def as_jpeg(picture: Image.Image) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=40)
    return Image.open(content)


NEARLY = {
    "jpeg": as_jpeg,
    "smaller": lambda picture: picture.resize((50, 33)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.15),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def write(folder: Path, pictures: dict[str, Image.Image]) -> Path:
    for part in ("control_images", "training_images"):
        (folder / part).mkdir(parents=True)
    for name, picture in pictures.items():
        picture.save(folder / "control_images" / f"{name}.png")
        Image.new("RGB", (64, 64), "black").save(folder / "training_images" / f"{name}.png")  # as masks look alike
        (folder / "training_images" / f"{name}.txt").write_text("draw the mask")
    return folder


def test_the_hash_is_the_sign_of_horizontal_steps() -> None:
    rising = Image.fromarray(np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1)))
    assert hashes.difference_hash(rising) == 2**64 - 1
    assert hashes.difference_hash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    step = np.zeros((8, 9), dtype=np.uint8)
    step[0, 1:] = 50  # one step up: the first bit of the first row
    assert hashes.difference_hash(Image.fromarray(step)) == 1 << 63


@pytest.mark.parametrize("change", NEARLY)
def test_changed_copies_are_alike_and_other_pictures_are_not(change: str, tmp_path: Path) -> None:
    pictures = {str(seed): photograph(seed) for seed in range(12)}
    pictures |= {f"copy-{seed}": NEARLY[change](photograph(seed)) for seed in range(4)}
    dataset = open_folder(write(tmp_path / "pairs", pictures))
    labels = dict(
        zip((row.key for row in dataset.rows), alike.groups(alike.input_hashes(dataset)).tolist(), strict=True)
    )
    assert all(labels[f"copy-{seed}"] == labels[str(seed)] for seed in range(4))
    assert len(set(labels.values())) == 12


def test_portraits_drawn_alike_are_different_pictures() -> None:
    dataset = open_folder(ROOT / "data" / "face_seg")
    assert len(set(alike.groups(alike.input_hashes(dataset)).tolist())) == len(dataset)


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_groups_equal_those_of_all_comparisons(distance: int) -> None:
    """Against every pair compared, and a plain search through the graph of those that are close."""
    rng = np.random.default_rng(distance)
    seeds = rng.integers(0, 2**63, 20, dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, 64, (200, 3), dtype=np.uint64)
    own = seeds[rng.integers(0, 20, 200)] ^ flips[:, 0] ^ flips[:, 1] ^ flips[:, 2]
    mirrored = rng.integers(0, 2**63, 200, dtype=np.uint64)
    mirrored[:5] = own[100:105]
    both = np.stack([own, mirrored], axis=1)

    close = np.zeros((200, 200), dtype=bool)
    for first in (0, 1):
        for second in (0, 1):
            bits = np.bitwise_count(both[:, None, first] ^ both[None, :, second])
            close |= bits <= distance
    expected = np.full(200, -1)
    for start in range(200):
        waiting = [start] if expected[start] < 0 else []
        while waiting:
            row = waiting.pop()
            if expected[row] < 0:
                expected[row] = start
                waiting += np.flatnonzero(close[row] | close[:, row]).tolist()
    found = alike.groups(both, distance)
    assert (np.equal.outer(found, found) == np.equal.outer(expected, expected)).all()


def test_the_choice_follows_content_and_keeps_copies_together(tmp_path: Path) -> None:
    pictures = {str(seed): photograph(seed) for seed in range(10)}
    pictures |= {f"copy-{seed}": as_jpeg(photograph(seed)) for seed in range(10)}
    dataset = open_folder(write(tmp_path / "pairs", pictures))
    for share in (0.1, 0.3, 0.5):
        chosen = {dataset.rows[row].key for row in alike.choose(dataset, share)}
        assert len(chosen) == share * 20
        assert {key.removeprefix("copy-") for key in chosen} == {key for key in chosen if "-" not in key}

    renamed = {f"{int(name) * 7 % 10:02d}": picture for name, picture in list(pictures.items())[:10]}
    few = open_folder(write(tmp_path / "few", dict(list(pictures.items())[:10])))
    other = open_folder(write(tmp_path / "renamed", renamed))
    assert {alike.input_of(few.rows[row])[-5] for row in alike.choose(few, 0.3)} == {
        str(next(old for old in range(10) if old * 7 % 10 == int(other.rows[row].key)))
        for row in alike.choose(other, 0.3)
    }


def test_all_alike_cannot_be_split(tmp_path: Path) -> None:
    dataset = open_folder(write(tmp_path / "same", {str(place): photograph(0) for place in range(4)}))
    with pytest.raises(ValueError, match="smallest group of rows with inputs that look alike has 4"):
        alike.choose(dataset, 0.25)


def test_leaks_are_found(tmp_path: Path) -> None:
    training = open_folder(write(tmp_path / "training", {str(seed): photograph(seed) for seed in range(6)}))
    held_out = open_folder(write(tmp_path / "held", {"a": photograph(50), "b": as_jpeg(photograph(3))}))
    assert [held_out.rows[row].key for row in alike.leaking(held_out, training)] == ["b"]


def test_a_part_is_its_rows(pairs: Path, tmp_path: Path, write_pairs: Callable[..., Path]) -> None:
    whole = open_folder(pairs)
    part = Part(whole, [1, 4])
    assert [row.key for row in part.rows] == [whole.rows[1].key, whole.rows[4].key] and len(part) == 2
    assert (part.prompt(1), part.geometry(1), part.plan(1)) == (whole.prompt(4), whole.geometry(4), whole.plan(4))
    assert np.array_equal(np.asarray(part.load(1).target), np.asarray(whole.load(4).target))
    damaged = Path(shutil.copytree(pairs, tmp_path / "damaged"))
    (damaged / "training_images" / f"{whole.rows[0].key}.png").write_bytes(b"no picture")
    assert Part(open_folder(damaged), [1, 4]).check(decode=True) == []
    assert len(Part(open_folder(damaged), [0, 4]).check(decode=True)) == 1


def test_places_are_spread() -> None:
    assert spread(3, 9) == [0, 4, 8]
    assert spread(5, 2) == [0, 1]
    assert spread(1, 7) == [0]
