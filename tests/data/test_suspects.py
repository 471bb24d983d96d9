"""Notes about data that is legal and hardly ever meant: each where it belongs, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_image_finetune.config import DatasetArguments
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.data.part import Part
from qwen_image_finetune.data.suspects import cut_off_note, few_note
from qwen_image_finetune.records import Extent

DATA = Path(__file__).parents[2] / "data"


def dataset(folder: Path, **arguments: Any) -> ImageDataset:
    """Pictures of the family's own area are 128 x 128."""

    def size(width: int, height: int, area: int | None, references: int = 1) -> Extent:
        scale = ((area or 128 * 128) / (width * height)) ** 0.5
        return round(width * scale), round(height * scale)

    return ImageDataset(DatasetArguments(dataset_path=str(folder), **arguments), size, 16, 3)


def notes(folder: Path, decode: bool = True, **arguments: Any) -> list[str]:
    """What is said about sound data, checked twice: each line once."""
    data = dataset(folder, **arguments)
    assert data.check(decode) == data.check(decode) == []
    return data.notes


def picture(seed: int, extent: Extent) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(extent, Image.Resampling.BICUBIC)


def pair(
    folder: Path, stem: str, target: Image.Image, source: Image.Image | None, caption: str = "a hat", end: str = "png"
) -> None:
    for name in ("control_images", "training_images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    target.save(folder / f"training_images/{stem}.png")
    (folder / f"training_images/{stem}.txt").write_text(caption)
    if source is not None:
        source.save(folder / f"control_images/{stem}.{end}")


def pairs(folder: Path, stems: str, target: Extent = (120, 90), source: Extent | None = (120, 90), **more: Any) -> Path:
    """A pair of different pictures for each letter."""
    for stem in stems:
        seed = 2 * ord(stem)
        pair(folder, stem, picture(seed, target), None if source is None else picture(seed + 1, source), **more)
    return folder


def test_sound_pairs_get_no_note(tmp_path: Path) -> None:
    assert notes(pairs(tmp_path, "ab")) == []
    assert notes(tmp_path, resolution=128) == []
    assert notes(pairs(tmp_path, "cd", source=(240, 180))) == []  # the same frame, at another size
    assert notes(tmp_path, image_size=[128, 96]) == []


@pytest.mark.parametrize("name", ["face_seg", "face_seg_held_out", "face_hat"])
@pytest.mark.parametrize("image_size", [[512, 512], [64, 64]])
def test_the_example_data_gets_no_note(name: str, image_size: list[int]) -> None:
    assert notes(DATA / name, image_size=image_size) == []


@pytest.mark.parametrize("options", [{}, {"image_size": [128, 96]}])
@pytest.mark.parametrize("decode", [True, False])
def test_sources_of_another_shape(tmp_path: Path, options: dict[str, Any], decode: bool) -> None:
    pairs(tmp_path, "abc")
    pairs(tmp_path, "d", source=(121, 90))  # within a percent
    assert notes(tmp_path, decode, **options) == []
    pairs(tmp_path, "bc", source=(90, 120))
    (note,) = notes(tmp_path, decode, **options)
    assert note.startswith(
        "2 of 4 sources have another aspect ratio than their target (b, c): the model learns to zoom"
    )
    pairs(tmp_path, "ad", source=(123, 90))
    (note,) = notes(tmp_path, decode, **options)
    assert note.startswith("4 of 4 sources have another aspect ratio than their target (a, b, c, ...)")


def test_only_the_first_reference_has_to_have_the_shape(tmp_path: Path) -> None:
    pairs(tmp_path, "ab")
    picture(0, (50, 99)).save(tmp_path / "control_images/b_control_1.png")
    assert notes(tmp_path) == ["rows differ in the number of references: 1 rows with 1, 1 rows with 2"]
    picture(0, (50, 99)).save(tmp_path / "control_images/a_control_1.png")
    assert notes(tmp_path) == []


def test_rows_without_references_have_no_source_to_compare(tmp_path: Path) -> None:
    for stem in "ab":
        picture(ord(stem), (120, 90)).save(tmp_path / f"{stem}.png")
    (tmp_path / "metadata.csv").write_text("image,prompt\na.png,a hat\nb.png,a hat\n")
    assert notes(tmp_path) == ["no row has a reference: training on captions alone"]


@pytest.mark.parametrize("decode", [True, False])
def test_targets_far_smaller_than_they_are_trained_at(tmp_path: Path, decode: bool) -> None:
    pairs(tmp_path, "a"), pairs(tmp_path, "b", (64, 64), (64, 64))
    assert notes(tmp_path, decode) == []  # twice in width and height, and no more
    pairs(tmp_path, "c", (32, 32), (32, 32))
    (note,) = notes(tmp_path, decode)
    assert note.startswith("1 of 3 targets are enlarged to be trained on, up to 4.0 times in width and height (c): ")
    assert notes(tmp_path, decode, resolution=64) == []
    (note,) = notes(tmp_path, decode, resolution=256)
    assert note.startswith(
        "3 of 3 targets are enlarged to be trained on, up to 8.0 times in width and height (a, b, c)"
    )
    (note,) = notes(pairs(tmp_path / "other", "a"), decode, center_crop=True, center_crop_ratio=0.5)
    assert note.startswith("1 of 1 targets are enlarged")  # of the part that is kept


@pytest.mark.parametrize("decode", [True, False])
def test_empty_captions(tmp_path: Path, decode: bool) -> None:
    pairs(tmp_path, "ab"), pairs(tmp_path, "c", caption=" \n")
    assert notes(tmp_path, decode) == ["1 of 3 captions are empty (c)"]
    pairs(tmp_path, "ab", caption="")
    assert notes(tmp_path, decode) == ["all 3 captions are empty: what is learned will not depend on the prompt"]


def test_the_same_picture_in_another_format(tmp_path: Path) -> None:
    """Only decoding shows it, and no small edit counts as none."""
    pairs(tmp_path, "a")
    portrait = Image.open(DATA / "face_seg/control_images/face_00.jpg").convert("RGB")
    edited = portrait.copy()
    edited.paste((200, 0, 0), (100, 100, 110, 110))
    pair(tmp_path, "b", portrait, edited)
    pair(tmp_path, "c", portrait, portrait, end="jpg")
    assert notes(tmp_path, decode=False) == []
    assert notes(tmp_path) == [
        "1 of 3 pairs have the same picture as source and target (c): nothing to learn from them"
    ]


def test_targets_shifted_against_their_source(tmp_path: Path) -> None:
    pairs(tmp_path, "a")
    portrait = Image.open(DATA / "face_seg/control_images/face_00.jpg").convert("RGB")
    pair(tmp_path, "b", portrait.crop((6, 8, 206, 208)), portrait.crop((0, 0, 200, 200)))
    assert notes(tmp_path, decode=False) == []
    assert notes(tmp_path) == [
        "1 of 2 targets are shifted against their source, by up to about 10 pixels (b): the model learns the shift as "
        "well"
    ]


def test_copies_under_another_name(tmp_path: Path) -> None:
    target, source = picture(1, (120, 90)), picture(2, (120, 90))
    pair(tmp_path, "a", target, source)
    pair(tmp_path, "b", target, source, caption="another hat")
    pair(tmp_path, "c", target, picture(3, (120, 90)))
    pair(tmp_path, "d", picture(4, (120, 90)), source)
    assert notes(tmp_path) == []  # other prompts, sources or targets: a task of their own
    pair(tmp_path, "e", target, source)
    assert notes(tmp_path, decode=False) == []
    (note,) = notes(tmp_path)
    assert note.startswith("1 of 5 pairs are copies of another, with the same pictures and prompt (e of a): ")


def test_near_copies_by_look(tmp_path: Path) -> None:
    """Smaller, mirrored, saved with loss, brighter: the same pair again, where target, source and prompt are."""
    pairs(tmp_path, "abcdef")
    target, source = Image.open(tmp_path / "training_images/a.png"), Image.open(tmp_path / "control_images/a.png")
    pair(tmp_path, "smaller", target.resize((100, 75)), source.resize((100, 75)), end="jpg")
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    pair(tmp_path, "turned", target.transpose(flip), source.transpose(flip))
    pair(tmp_path, "words", target.resize((100, 75)), source.resize((100, 75)), caption="another hat")
    pair(tmp_path, "edit", picture(99, (120, 90)), source.resize((100, 75)))
    for name, colour in (("red", "red"), ("blue", "blue")):  # flat pictures have one hash
        pair(tmp_path, name, Image.new("RGB", (120, 90), colour), Image.new("RGB", (120, 90), "grey"))
    assert [line for line in notes(tmp_path) if "look like" in line] == [
        "2 of 12 pairs look like another with the same prompt (smaller and a, turned and a): near-copies count more "
        "than the others"
    ]


def test_what_was_converted_or_passed_over_is_counted(tmp_path: Path) -> None:
    pairs(tmp_path, "abc")
    for stem in "ab":
        target = Image.open(tmp_path / f"training_images/{stem}.png")
        target.load()
        target.save(tmp_path / f"training_images/{stem}.png", icc_profile=b"none")
    (note,) = notes(tmp_path)
    assert note.startswith("2 of 3 pairs have a picture of this kind (a, b): its colour profile cannot be applied")


def test_few_pairs_are_said() -> None:
    assert few_note(0) == few_note(10) == []
    assert few_note(9)[0].startswith("9 pairs: so few are learnt by heart")


def test_a_part_says_what_decoding_its_rows_shows(tmp_path: Path) -> None:
    """As training without the cache decodes them: rows to train on and rows held out, one after the other."""
    portrait = Image.open(DATA / "face_seg/control_images/face_00.jpg").convert("RGB")
    pairs(tmp_path, "ab"), pair(tmp_path, "c", portrait, portrait, end="jpg")
    whole = dataset(tmp_path)
    assert whole.check() == [] and whole.notes == []
    sound, part = Part(whole, [0, 1]), Part(Part(whole, [1, 2]), [0, 1])
    for rows in (sound, part, part):
        assert rows.check(decode=True, rows=range(2)) == []
    assert sound.notes == []
    assert part.notes == ["1 of 2 pairs have the same picture as source and target (c): nothing to learn from them"]


def test_checking_pictures_for_training_says_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_image_finetune.encoding.limits import check_pictures

    pairs(tmp_path, "a"), pair(tmp_path, "b", picture(1, (120, 90)), picture(1, (120, 90)), end="webp")
    Image.open(tmp_path / "training_images/b.png").save(tmp_path / "control_images/b.webp", lossless=True)
    data = dataset(tmp_path)
    for _ in range(2):
        check_pictures(data, range(2))
    said = capsys.readouterr().out
    assert said == "note: 1 of 2 pairs have the same picture as source and target (b): nothing to learn from them\n"


def test_targets_that_cannot_be_read_have_no_shape() -> None:
    """They may be left out by data.max_bad_share; what is said of the others is true."""
    sizes = np.array([[100, 100], [0, 0], [200, 100]], dtype=np.uint32)
    (note,) = cut_off_note(sizes, (64, 64))
    assert "cuts up to 50% off 1 of 2 targets" in note
    assert cut_off_note(sizes[1:2], (64, 64)) == []
