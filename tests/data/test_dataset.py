"""The dataset from files to examples: what is checked, what is cropped, what a row becomes."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_image_finetune.config import DatasetArguments
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.geometry import Picture
from qwen_image_finetune.data.images import DataError, resize

MULTIPLE = 16


def size(width: int, height: int, area: int | None = None, references: int = 1) -> tuple[int, int]:
    """A family's rule: the aspect ratio kept, sides in multiples of 16, model's own area 64 x 64."""
    scale = math.sqrt((area or 64 * 64) / (width * height))
    return round(width * scale / MULTIPLE) * MULTIPLE, round(height * scale / MULTIPLE) * MULTIPLE


def dataset(*folders: Path, max_references: int = 3, seed: int = 0, **arguments: Any) -> ImageDataset:
    paths = [str(folder) for folder in folders]
    given = DatasetArguments(dataset_path=paths[0] if len(paths) == 1 else paths, **arguments)
    return ImageDataset(given, size, MULTIPLE, max_references, seed)


def draw(path: Path, extent: tuple[int, int], seed: int = 0, **save: Any) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (extent[1], extent[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(path, **save)
    return image


def pair(
    folder: Path,
    stem: str = "a",
    target: tuple[int, int] = (80, 60),
    reference: tuple[int, int] | None = (80, 60),
    caption: str | bytes = "a hat",
) -> Path:
    draw(folder / f"training_images/{stem}.png", target, seed=1)
    if reference is not None:
        draw(folder / f"control_images/{stem}.png", reference, seed=2)
    path = folder / f"training_images/{stem}.txt"
    path.write_bytes(caption.encode() if isinstance(caption, str) else caption)
    return folder


def complaints(folder: Path, decode: bool = False, **arguments: Any) -> list[str]:
    return [line.removeprefix(f"{folder}/") for line in dataset(folder, **arguments).check(decode)]


def test_a_pair_at_the_familys_sizes(tmp_path: Path) -> None:
    data = dataset(pair(tmp_path, target=(80, 60), reference=(200, 50)))
    assert (len(data), data.check(decode=True)) == (1, [])
    assert data.geometry(0) == ((80, 48), (128, 32)) == (size(80, 60), size(200, 50))

    example = data.load(0)
    assert (example.key, example.prompt, example.mask) == ("a", "a hat", None)
    with Image.open(tmp_path / "training_images/a.png") as target:
        assert np.array_equal(example.target, resize(target, (80, 48)))
    with Image.open(tmp_path / "control_images/a.png") as reference:
        assert np.array_equal(example.references[0], reference)  # at its own size
    assert example.reference_sizes == ((128, 32),)


def test_resolution_is_the_side_of_a_square_of_the_same_area(tmp_path: Path) -> None:
    data = dataset(pair(tmp_path, target=(60, 60)), resolution=128)
    assert data.geometry(0) == ((128, 128), size(80, 60, 128 * 128))


def test_image_size_crops_the_pair_alike(tmp_path: Path) -> None:
    data = dataset(pair(tmp_path, target=(80, 60), reference=(160, 120)), image_size=[32, 32])
    plan = data.plan(0)
    assert plan.target == Picture(tmp_path / "training_images/a.png", (10, 0, 70, 60), (32, 32))
    assert plan.references == (Picture(tmp_path / "control_images/a.png", (20, 0, 140, 120), (32, 32)),)
    example = data.load(0)
    assert example.target.size == (32, 32)
    assert example.references[0].size == (120, 120)
    assert example.reference_sizes == ((32, 32),)


def test_image_size_is_rounded_down_to_what_the_family_takes(tmp_path: Path) -> None:
    pair(tmp_path)
    assert dataset(tmp_path, image_size=[64, 48]).notes == []
    data = dataset(tmp_path, image_size=[70, 48])
    assert data.geometry(0)[0] == (64, 48)
    (note,) = data.notes
    assert "image_size=[70, 48] is rounded down to [64, 48]" in note
    with pytest.raises(DataError, match=r"image_size=\[64, 15\]: this model takes sides that are multiples of 16"):
        dataset(tmp_path, image_size=[64, 15])


def test_turned_photographs_line_up(tmp_path: Path) -> None:
    """A portrait stored lying on its side is planned, checked and loaded as a portrait."""
    tags = Image.Exif()
    tags[274] = 6
    pair(tmp_path, target=(60, 80), reference=None)
    draw(tmp_path / "control_images/a.png", (80, 60), exif=tags)
    data = dataset(tmp_path, image_size=[48, 64])
    assert data.check() == []
    assert data.plan(0).references[0].box == (0, 0, 60, 80)
    assert data.load(0).references[0].size == (60, 80)


@pytest.mark.parametrize("options", [{}, {"image_size": [32, 48]}])
def test_center_crop(tmp_path: Path, options: dict[str, Any]) -> None:
    pair(tmp_path, target=(80, 60), reference=(160, 120))
    draw(tmp_path / "training_images/a_mask.png", (40, 30))
    data = dataset(tmp_path, center_crop=True, center_crop_ratio=0.5, use_edit_mask=True, **options)
    plan = data.plan(0)
    assert plan.mask is not None
    left, upper, right, lower = plan.target.box
    if not options:
        assert plan.target.box == (20, 15, 60, 45)
        assert plan.target.size == size(40, 30)
    else:
        assert plan.target.box == (30, 15, 50, 45)  # 20 x 30 out of the middle 40 x 30
    assert plan.references[0].box == (2 * left, 2 * upper, 2 * right, 2 * lower)
    assert all(abs(mine - theirs / 2) <= 0.5 for mine, theirs in zip(plan.mask.box, plan.target.box, strict=True))
    assert plan.mask.size == plan.target.size


def test_random_crop(tmp_path: Path) -> None:
    pair(tmp_path, target=(80, 60), reference=(160, 120))
    pair(tmp_path, "b", target=(80, 60), reference=(160, 120))
    options: dict[str, Any] = {"random_crop": True, "crop_size": 40, "crop_scale": [0.5, 1.0]}
    data, again = dataset(tmp_path, **options), dataset(tmp_path, **options)
    visits = [data.plan(0, visit) for visit in range(20)]
    assert len({plan.target.box for plan in visits}) > 10
    assert {plan.target.size for plan in visits} == {size(40, 40)}  # one geometry, whatever is drawn
    for plan in visits:
        left, upper, right, lower = plan.target.box
        assert right - left == lower - upper
        assert 20 <= right - left <= 40
        assert plan.references[0].box == (2 * left, 2 * upper, 2 * right, 2 * lower)
    assert [again.plan(0, visit) for visit in reversed(range(20))] == visits[::-1]
    assert dataset(tmp_path, seed=1, **options).plan(0, 0) != visits[0]
    assert data.plan(1, 0).target.box != visits[0].target.box
    assert data.plan(0).target.box == (20, 10, 60, 50)  # where nothing is trained: the middle, unscaled
    assert data.load(0, 3).references[0].size == tuple(
        np.subtract(visits[3].references[0].box[2:], visits[3].references[0].box[:2])
    )


def test_random_crops_leave_the_geometry_alone(tmp_path: Path) -> None:
    """Rounding of scaled windows must not move a side over the edge to the next multiple."""
    pair(tmp_path, target=(83, 61), reference=(41, 97))
    data = dataset(tmp_path, random_crop=True, crop_scale=[0.1, 1.0])
    sizes = {
        tuple(picture.size for picture in (plan.target, *plan.references))
        for plan in map(data.plan, [0] * 200, range(200))
    }
    assert sizes == {data.geometry(0)}


def test_random_crop_has_the_shape_of_a_fixed_size(tmp_path: Path) -> None:
    data = dataset(pair(tmp_path), random_crop=True, image_size=[32, 64])
    boxes = [data.plan(0, visit).target.box for visit in range(20)]
    assert {(box[2] - box[0], box[3] - box[1]) for box in boxes} == {(30, 60)}
    assert len({box[0] for box in boxes}) > 5


def test_random_flips_turn_the_whole_pair(tmp_path: Path) -> None:
    pair(tmp_path, target=(80, 60), reference=(160, 120))
    draw(tmp_path / "training_images/a_mask.png", (80, 60))
    pair(tmp_path, "b")
    windows: dict[str, Any] = {"random_crop": True, "crop_size": 40, "crop_scale": [0.5, 1.0], "use_edit_mask": True}
    data, again = dataset(tmp_path, random_flip=True, **windows), dataset(tmp_path, random_flip=True, **windows)
    upright = dataset(tmp_path, **windows)
    mirrored = [data.plan(0, visit).target.mirrored for visit in range(200)]
    assert 70 < sum(mirrored) < 130
    assert [again.plan(0, visit).target.mirrored for visit in reversed(range(200))] == mirrored[::-1]
    assert [data.plan(1, visit).target.mirrored for visit in range(200)] != mirrored
    for visit in range(8):
        flipped, plain = data.load(0, visit), upright.load(0, visit)  # the same windows: flips are drawn after them
        assert flipped.mask is not None and plain.mask is not None
        pictures = (flipped.target, *flipped.references, flipped.mask)
        for ours, theirs in zip(pictures, (plain.target, *plain.references, plain.mask), strict=True):
            expected = np.asarray(theirs, dtype=int)
            difference = np.abs(np.asarray(ours) - (expected[:, ::-1] if mirrored[visit] else expected)).max()
            assert difference <= (1 if mirrored[visit] else 0)  # rounding of the resize
    assert not data.plan(0).target.mirrored  # nothing is random where nothing is trained


def test_masks_follow_the_target(tmp_path: Path) -> None:
    pair(tmp_path, target=(80, 60))
    pair(tmp_path, "b", target=(80, 60))
    half = Image.new("RGBA", (40, 30))  # nothing painted counts as background
    half.paste((255, 255, 255, 255), (20, 0, 40, 30))
    half.save(tmp_path / "training_images/a_mask.png")
    data = dataset(tmp_path, use_edit_mask=True, image_size=[64, 64])
    assert data.check(decode=True) == []
    assert data.notes[:1] == ["1 of 2 rows have no edit mask and count as foreground everywhere"]
    mask = data.load(0).mask
    assert mask is not None
    assert (mask.mode, mask.size) == ("L", (64, 64))
    assert (np.asarray(mask)[:, :30] < 16).all()  # the resize rings a little at an edge
    assert (np.asarray(mask)[:, 34:] > 239).all()
    assert data.load(1).mask is None
    assert dataset(tmp_path).load(0).mask is None


def test_mask_problems(tmp_path: Path) -> None:
    pair(tmp_path, target=(80, 60))
    assert f"no row of {tmp_path} has a mask" in complaints(tmp_path, use_edit_mask=True)[0]
    draw(tmp_path / "training_images/a_mask.png", (60, 80))
    (line,) = complaints(tmp_path, use_edit_mask=True)
    assert line == "training_images/a_mask.png: 60 x 80 pixels have not the aspect ratio of the target's 80 x 60"
    Image.new("L", (80, 60), 1).save(tmp_path / "training_images/a_mask.png")
    assert complaints(tmp_path, use_edit_mask=True) == []
    assert "the brightest value of this mask is 1" in complaints(tmp_path, decode=True, use_edit_mask=True)[0]


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"\xef\xbb\xbfa hat\r\n", "a hat"),
        (b"  two\r\nlines\rand one\n\n", "two\nlines\nand one"),
        (b"", ""),
        (b"\xef\xbb\xbf \r\n", ""),
        ("ein schöner Hut 帽子".encode(), "ein schöner Hut 帽子"),
    ],
)
def test_prompts(tmp_path: Path, content: bytes, prompt: str) -> None:
    data = dataset(pair(tmp_path, caption=content))
    assert data.check() == []
    assert data.prompt(0) == data.load(0).prompt == prompt


@pytest.mark.parametrize("content", ["hut".encode("utf-16"), "schön".encode("latin-1")])
def test_prompts_in_other_encodings(tmp_path: Path, content: bytes) -> None:
    data = dataset(pair(tmp_path, caption=content))
    assert data.check()[0].startswith(f"{tmp_path / 'training_images/a.txt'}: not UTF-8")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8"):
        data.prompt(0)


def test_a_caption_of_any_length_is_not_read(tmp_path: Path) -> None:
    data = dataset(pair(tmp_path))
    with open(tmp_path / "training_images/a.txt", "w") as file:
        file.truncate(2**40)
    assert data.check() == [f"{tmp_path / 'training_images/a.txt'}: {2**40} bytes; a caption has at most 1000000"]


def test_prompts_of_a_table(tmp_path: Path) -> None:
    draw(tmp_path / "t.png", (32, 32))
    (tmp_path / "metadata.jsonl").write_text('{"image": "t.png", "prompt": " red\\r\\nhat "}')
    data = dataset(tmp_path)
    assert data.check() == []
    assert (data.rows[0].key, data.prompt(0)) == ("t.png", "red\nhat")
    assert data.notes == ["no row has a reference: training on captions alone"]


def test_one_report_of_everything(tmp_path: Path) -> None:
    for stem in ("good", "cut", "empty", "text", "moving", "nohat", "uncaptioned", "latin", "many"):
        pair(tmp_path, stem)
    targets, references = tmp_path / "training_images", tmp_path / "control_images"
    (targets / "cut.png").write_bytes((targets / "cut.png").read_bytes()[:2000])
    (references / "empty.png").write_bytes(b"")
    (targets / "text.png").write_text("not found")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(references / "moving.png", save_all=True, append_images=frames[1:])
    (references / "nohat.png").unlink()
    (targets / "uncaptioned.txt").unlink()
    (targets / "latin.txt").write_bytes(b"\xe4")
    for number in (1, 2):
        draw(references / f"many_control_{number}.png", (9, 9))

    def heads(lines: list[str]) -> list[str]:
        return [":".join(line.split(":")[:2]) for line in lines]

    listing = [
        "training_images/nohat.png: no reference; control_images has no picture nohat",
        "training_images/uncaptioned.png: no caption; uncaptioned.txt is missing beside it (it may be empty)",
    ]
    headers = [
        "control_images/empty.png: an empty file",
        "training_images/latin.txt: not UTF-8 ('utf-8' codec can't decode byte 0xe4 in position 0",
        "training_images/many.png: 3 references; this model takes at most 2",
        "control_images/moving.png: an animation; save the wanted frame as a picture of its own",
        "training_images/text.png: not a picture, or damaged at its beginning; JPEG, PNG and WEBP are read",
    ]
    cut = "training_images/cut.png: cannot be read as a picture (image file is truncated)"
    assert heads(complaints(tmp_path, max_references=2)) == listing + headers
    (found,) = set(heads(complaints(tmp_path, decode=True, max_references=2))) - set(listing + headers)
    assert found.startswith(cut[:60])


def test_check_reports_progress_and_repeats_no_line(tmp_path: Path) -> None:
    draw(tmp_path / "t.png", (32, 32))
    (tmp_path / "r.png").touch()
    line = '{"image": "t.png", "edit_image": "r.png", "prompt": ""}\n'
    (tmp_path / "metadata.jsonl").write_text(line * 3)
    seen: list[tuple[int, int]] = []
    assert dataset(tmp_path).check(progress=lambda done, rows: seen.append((done, rows))) == [
        f"{tmp_path / 'r.png'}: an empty file"
    ]
    assert seen == [(3, 3)]


def test_several_folders(tmp_path: Path) -> None:
    first, second = pair(tmp_path / "x/faces"), pair(tmp_path / "hats")
    data = dataset(first, second)
    assert [row.key for row in data.rows] == ["faces/a", "hats/a"]
    assert data.check() == []
    pair(tmp_path / "y/faces", "b")
    data = dataset(first, tmp_path / "y/faces", tmp_path / "none")
    assert [row.key for row in data.rows] == ["1-faces/a", "2-faces/b"]
    (line,) = data.check()
    assert line.startswith(f"no folder {tmp_path / 'none'}; {tmp_path} holds ")


def test_pairs_without_a_change_are_counted_and_refused_where_all_are(tmp_path: Path) -> None:
    pair(tmp_path), pair(tmp_path, "b")
    source, target = tmp_path / "control_images/b.png", tmp_path / "training_images/b.png"
    source.write_bytes(target.read_bytes()[:-1] + b"x")  # of the same size
    data = dataset(tmp_path)
    assert data.check() == [] and data.notes == []
    source.write_bytes(target.read_bytes())
    data = dataset(tmp_path)
    assert data.check(decode=True) == []
    assert data.notes == ["1 of 2 pairs have the same picture as source and target (b): nothing to learn from them"]
    pair(tmp_path, "a", target=(40, 40), reference=(40, 40))
    (tmp_path / "control_images/a.png").write_bytes((tmp_path / "training_images/a.png").read_bytes())
    (line,) = dataset(tmp_path).check()
    assert line.startswith("every one of 2 pairs has the same picture as source and target")


def test_a_fixed_shape_that_cuts_much_off_is_mentioned(tmp_path: Path) -> None:
    pair(tmp_path, target=(90, 60), reference=(90, 60)), pair(tmp_path, "b", target=(64, 60), reference=(64, 60))
    data = dataset(tmp_path, image_size=[32, 32])
    assert data.check() == []
    (note,) = data.notes
    assert note.startswith("data.init_args.image_size=[32, 32] cuts up to 33% off 1 of 2 targets")
    for options in ({}, {"image_size": [48, 32], "random_crop": True}):
        data = dataset(tmp_path, **options)
        assert data.check() == [] and data.notes == []


def test_rows_that_differ_in_references_are_mentioned(tmp_path: Path) -> None:
    pair(tmp_path), pair(tmp_path, "b")
    draw(tmp_path / "control_images_1/b.png", (40, 40))
    data = dataset(tmp_path, image_size=[32, 32])
    assert data.notes == ["rows differ in the number of references: 1 rows with 1, 1 rows with 2"]
    assert data.geometry(1) == ((32, 32), (32, 32), size(40, 40, 32 * 32))


def test_tiny_and_narrow_pictures(tmp_path: Path) -> None:
    data = dataset(pair(tmp_path, target=(1, 1), reference=(1, 1)), center_crop=True, center_crop_ratio=0.5)
    assert data.check(decode=True) == []
    assert data.load(0).target.size == (64, 64)
    pair(tmp_path, target=(2000, 1))
    (line,) = complaints(tmp_path)
    assert line.startswith("training_images/a.png: 2000 x 1 pixels become 2864 x 0: too long and narrow")


def test_a_picture_that_changes_while_it_is_used(tmp_path: Path) -> None:
    data = dataset(pair(tmp_path))
    data.plan(0)
    draw(tmp_path / "training_images/a.png", (81, 60))
    with pytest.raises(DataError, match=r"a\.png: changed while it was used"):
        data.load(0)


def test_workers_can_take_the_dataset_along(tmp_path: Path) -> None:
    data = dataset(pair(tmp_path), random_crop=True)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.plan(0, 4) == data.plan(0, 4)
    assert np.array_equal(copy.load(0, 4).target, data.load(0, 4).target)


def test_the_import_path_of_configurations() -> None:
    from src.data.dataset import ImageDataset as door

    assert door is ImageDataset
