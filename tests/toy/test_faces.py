"""Drawn faces: masks that say what the picture shows, and the datasets made of them."""

import runpy
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image_finetune.toy.faces import BACKGROUND, EYES, FACE, HAIR, HAT, MOUTH, PALETTE, classes, draw_face

ROOT = Path(__file__).parents[2]
DATASETS = ("face_seg", "face_seg_held_out")


def drawn(seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Picture (size, size, 3) and classes (size, size)."""
    picture, mask = draw_face(np.random.default_rng(seed), size)
    return np.asarray(picture), classes(np.asarray(mask))


def share(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the pixels on which two class maps agree."""
    return float((one == other).mean())


def test_the_mask_holds_no_colours_but_the_palette() -> None:
    for seed in range(10):
        _, mask = draw_face(np.random.default_rng(seed), 64)
        colours = {colour for _, colour in mask.getcolors()}
        assert colours <= set(PALETTE.values())


def test_same_seed_same_face_at_every_size() -> None:
    picture, labels = drawn(3, 64)
    again, _ = drawn(3, 64)
    assert np.array_equal(picture, again)
    _, larger = drawn(3, 128)
    assert share(labels, larger[1::2, 1::2]) > 0.97


def test_every_face_is_another() -> None:
    pictures = [drawn(seed)[0].astype(int) for seed in range(12)]
    assert all(np.abs(one - other).mean() > 5 for one, other in combinations(pictures, 2))


def test_every_part_is_seen_and_in_its_place() -> None:
    seen = np.zeros(len(PALETTE), dtype=int)
    for seed in range(40):
        _, labels = drawn(seed)
        seen += np.isin(np.arange(len(PALETTE)), labels)
        rows = {part: np.nonzero(labels == part)[0].mean() for part in (FACE, EYES, MOUTH)}
        assert max(rows[EYES], rows[FACE]) < rows[MOUTH]
        assert (labels == BACKGROUND).mean() > 0.3
        if HAT in labels:
            assert np.nonzero(labels == HAT)[0].mean() < rows[EYES]
    assert (seen[[BACKGROUND, FACE, EYES, MOUTH]] == 40).all()
    assert seen[HAIR] > 20
    assert 8 < seen[HAT] < 30


def test_masks_follow_the_edges_of_the_picture() -> None:
    """Colours change more across a border of the mask than inside a part; a shifted mask would not show that."""
    steps: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(10):
        picture, labels = drawn(seed, 128)
        change = np.abs(np.diff(picture.astype(float), axis=1)).sum(axis=-1)
        border = labels[:, 1:] != labels[:, :-1]
        for kind in (True, False):
            steps[kind].append(float(change[border == kind].mean()))
    assert np.mean(steps[True]) > 8 * np.mean(steps[False])


def test_classes_are_the_nearest_colours() -> None:
    painted = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    colours = np.array(list(PALETTE.values()), dtype=np.int64)
    squares = ((painted[..., None, :].astype(np.int64) - colours) ** 2).sum(axis=-1)
    assert np.array_equal(classes(painted), squares.argmin(axis=-1))


def test_colours_stay_apart_when_a_prediction_is_off() -> None:
    colours = [np.array(colour) for colour in PALETTE.values()]
    assert min(np.linalg.norm(one - other) for one, other in combinations(colours, 2)) > 150


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_are_complete(name: str) -> None:
    controls = sorted((ROOT / "data" / name / "control_images").iterdir())
    targets = sorted((ROOT / "data" / name / "training_images").iterdir())
    assert [file.suffix for file in controls] == [".jpg"] * 20
    assert [file.suffix for file in targets] == [".png", ".txt"] * 20
    names = [file.stem for file in controls]
    assert [file.stem for file in targets[::2]] == [file.stem for file in targets[1::2]] == names
    prompts = {file.read_text().strip() for file in targets[1::2]}
    assert len(prompts) == 3


@pytest.mark.parametrize(("script", "count"), [("draw_face_seg", 2 * 60), ("draw_face_hat", 4 * 12)])
def test_the_script_draws_the_committed_files_again(
    script: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the pixel for masks; JPEG encoders may differ a little from one version to the next."""
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path)])
    runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    written = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file())
    folders = [ROOT / "data" / folder.name for folder in tmp_path.iterdir()]
    committed = [file.relative_to(ROOT / "data") for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert written == sorted(committed) and len(written) == count
    for file in written:
        one, other = tmp_path / file, ROOT / "data" / file
        if file.suffix == ".txt":
            assert one.read_text() == other.read_text()
            continue
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other))
        assert np.abs(difference).mean() < (0.5 if file.suffix == ".jpg" else 1e-9), file


def test_the_second_reference_is_the_hat_that_the_target_wears() -> None:
    folder = ROOT / "data/face_hat"
    stems = [file.stem for file in sorted((folder / "training_images").glob("*.jpg"))]
    assert len(stems) == 12
    for stem in stems:
        face, hat, target = (
            np.asarray(Image.open(folder / file)).astype(int)
            for file in (
                f"control_images/{stem}.jpg",
                f"control_images/{stem}_control_1.jpg",
                f"training_images/{stem}.jpg",
            )
        )
        change = np.abs(target - face).max(axis=-1)
        worn, shown = change > 40, np.abs(hat - hat[0, 0]).max(axis=-1) > 20
        for part in (worn, shown):
            assert 0.02 < part.mean() < 0.3, stem
        assert change[~worn].mean() < 2, f"{stem}: more than the hat is another"
        colours = hat[shown].mean(axis=0) - target[worn].mean(axis=0)
        assert np.abs(colours).max() < 25, f"{stem}: another hat"


def test_nobody_trains_on_the_held_out_faces() -> None:
    masks = {
        name: [classes(np.asarray(Image.open(file))) for file in sorted((ROOT / "data" / name).rglob("*.png"))]
        for name in DATASETS
    }
    shared = [share(one, other) for one in masks[DATASETS[0]] for other in masks[DATASETS[1]]]
    assert max(shared) < 0.97
