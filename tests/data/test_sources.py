"""Folders and tables to rows; whatever is amiss is said, one line each."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from qwen_image_finetune.config import DataEntry, DatasetArguments
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.data.sources import read_folder, read_sets


def lay(folder: Path, *names: str) -> Path:
    """Empty files: pictures are not opened here."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def pair(stem: str) -> tuple[str, str, str]:
    return f"control_images/{stem}.jpg", f"training_images/{stem}.png", f"training_images/{stem}.txt"


def read(folder: Path, masks: bool = False) -> list[Row]:
    rows, problems = read_folder(folder, masks=masks)
    assert problems == []
    return rows


def complaints(folder: Path, masks: bool = False) -> list[str]:
    """Problems, with the folder's name taken off."""
    return [line.removeprefix(f"{folder}/") for line in read_folder(folder, masks=masks)[1]]


def test_pairs_in_the_order_of_their_keys(tmp_path: Path) -> None:
    lay(tmp_path, *pair("b"), *pair("a"), *pair("image_10"), *pair("image_1"))
    rows = read(tmp_path)
    assert [row.key for row in rows] == ["a", "b", "image_1", "image_10"]
    assert rows[2] == Row(
        key="image_1",
        folder=tmp_path,
        target_name="training_images/image_1.png",
        reference_names=("control_images/image_1.jpg",),
        caption_name="training_images/image_1.txt",
        prompt=None,
        mask_name=None,
    )
    assert rows[2].target == tmp_path / "training_images/image_1.png"
    assert rows[2].references == (tmp_path / "control_images/image_1.jpg",)
    assert rows[2].caption == tmp_path / "training_images/image_1.txt"
    assert rows[2].mask is None


def test_stems_match_exactly(tmp_path: Path) -> None:
    names = set(pair("image_1") + pair("image_10")) - {"control_images/image_1.jpg", "training_images/image_10.txt"}
    lay(tmp_path, *names, "control_images/image_10 .jpg", "control_images/Image_1.jpg")
    assert complaints(tmp_path) == [
        "control_images/Image_1.jpg: training_images has no picture Image_1",
        "control_images/image_10 .jpg: training_images has no picture image_10 ",
        "training_images/image_1.png: no reference; control_images has no picture image_1",
        "training_images/image_10.png: no caption; image_10.txt is missing beside it (it may be empty)",
    ]


def test_endings_in_any_case(tmp_path: Path) -> None:
    lay(tmp_path, "control_images/a.JPeG", "training_images/a.WEBP", "training_images/a.TXT")
    lay(tmp_path, "control_images/b.c.jpg", "training_images/b.c.PNG", "training_images/b.c.txt")
    assert [row.target.name for row in read(tmp_path)] == ["a.WEBP", "b.c.PNG"]


def test_references_beside_the_first_and_in_folders(tmp_path: Path) -> None:
    lay(tmp_path, *pair("a"), *pair("b"), *pair("a_control_3"))
    lay(tmp_path, "control_images/a_control_2.jpg", "control_images_1/a.png", "control_images_1/b.webp")
    lay(tmp_path, *(f"control_images/b_control_{number}.jpg" for number in range(2, 12)))
    references = {row.key: [str(path.relative_to(tmp_path)) for path in row.references] for row in read(tmp_path)}
    assert references == {
        "a": ["control_images/a.jpg", "control_images_1/a.png", "control_images/a_control_2.jpg"],
        "a_control_3": ["control_images/a_control_3.jpg"],  # a target of that name has the better claim
        "b": ["control_images/b.jpg", "control_images_1/b.webp"]
        + [f"control_images/b_control_{number}.jpg" for number in range(2, 12)],
    }


def test_gaps_and_doubles_among_references(tmp_path: Path) -> None:
    lay(tmp_path, *pair("a"), *pair("b"), *pair("c"))
    lay(tmp_path, "control_images/a_control_2.jpg", "control_images/b_control_1.jpg", "control_images_1/b.jpg")
    lay(tmp_path, "control_images/c_control_0.jpg", "control_images/c.webp")
    assert complaints(tmp_path) == [
        "control_images/c.webp: control_images/c.jpg has the same stem; keep one",
        "control_images/c_control_0.jpg: training_images has no picture c_control_0",
        "control_images_1/b.jpg: control_images/b_control_1.jpg is the same reference of b; keep one",
        "training_images/a.png: references are numbered [2]; count 1, 2, ... without gaps",
    ]


def test_masks_are_never_targets(tmp_path: Path) -> None:
    lay(tmp_path, *pair("a"), "training_images/a_mask.png", *pair("b"), *pair("lone_mask"))
    with_masks, without = read(tmp_path, masks=True), read(tmp_path, masks=False)
    assert [row.key for row in with_masks] == [row.key for row in without] == ["a", "b", "lone_mask"]
    assert [row.mask and row.mask.name for row in with_masks] == ["a_mask.png", None, None]
    assert [row.mask for row in without] == [None, None, None]


def test_captions_alone(tmp_path: Path) -> None:
    lay(tmp_path, "training_images/a.png", "training_images/a.txt")
    assert [row.references for row in read(tmp_path)] == [()]
    (tmp_path / "control_image").mkdir()
    assert complaints(tmp_path) == ["control_image: did you mean control_images?"]


def test_references_under_another_name_are_not_left_out_silently(tmp_path: Path) -> None:
    lay(tmp_path, "training_images/a.png", "training_images/a.txt", "control/a.PNG", "notes/read.md")
    (line,) = complaints(tmp_path)
    assert line.startswith("control: its pictures are not read; rename it to control_images")
    lay(tmp_path, "control_images/a.png")
    assert [row.reference_names for row in read(tmp_path)] == [("control_images/a.png",)]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("training_images/a.jpg",), "training_images/a.png: training_images/a.jpg has the same stem; keep one"),
        (("training_images/b.txt",), "training_images/b.txt: a caption without a picture of that name"),
        (("training_images/b.TIFF",), "training_images/b.TIFF: .tiff is not read; save it as .jpg, .jpeg, .png, .webp"),
        (
            ("training_images/more/b.png",),
            "training_images/more: a folder; only what lies directly in training_images is read",
        ),
        (("control_images_0/a.png",), "control_images_0: not read; references lie in control_images, control_images_1"),
    ],
)
def test_nothing_is_skipped_silently(tmp_path: Path, names: tuple[str, ...], problem: str) -> None:
    lay(tmp_path, *pair("a"), *names)
    (line,) = complaints(tmp_path)
    assert line.startswith(problem)


def test_what_other_programs_leave_behind_is_no_data(tmp_path: Path) -> None:
    lay(tmp_path, *pair("a"), "training_images/._a.png", "training_images/.DS_Store", "training_images/Thumbs.db")
    lay(tmp_path, "control_images/notes.md", "README.md", ".git/config")
    assert [row.key for row in read(tmp_path)] == ["a"]


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    assert complaints(tmp_path / "none") == [f"no folder {tmp_path / 'none'}; {tmp_path} holds no folders"]
    lay(tmp_path, "file", "my_pairs/notes.txt")
    (line,) = complaints(tmp_path / "my_pair")
    assert line == f"no folder {tmp_path / 'my_pair'}; did you mean {tmp_path / 'my_pairs'}?"
    assert complaints(tmp_path / "file") == [f"{tmp_path / 'file'}: not a folder; name the folder it lies in"]
    assert complaints(tmp_path)[0].startswith("training_images: no such folder; it holds the targets")
    lay(tmp_path, *pair("a"))
    for name in pair("a")[1:]:
        (tmp_path / name).unlink()
    (tmp_path / pair("a")[0]).unlink()
    assert complaints(tmp_path) == [f"{tmp_path}: no samples in training_images"]


def test_links_stay_inside(tmp_path: Path) -> None:
    folder, outside = lay(tmp_path / "set", *pair("a"), "store/b.png"), lay(tmp_path / "out", "c.png", "c.txt")
    os.symlink("../store/b.png", folder / "control_images/b.png")
    os.symlink(folder / "store/b.png", folder / "training_images/b.png")
    lay(folder, "training_images/b.txt")
    assert [row.key for row in read(folder)] == ["a", "b"]

    os.symlink(outside / "c.png", folder / "training_images/c.png")
    os.symlink("gone.png", folder / "control_images/d.png")
    os.symlink(outside, folder / "control_images_1")
    assert complaints(folder) == [
        "training_images/c.png: a link that leaves the data set's folder; copy the file there",
        f"control_images/d.png: a link to {folder / 'control_images/gone.png'}, which is not there",
        "control_images_1: a link that leaves the data set's folder; copy the file there",
    ]


def test_names_that_are_not_utf8_are_to_be_changed(tmp_path: Path) -> None:
    """They could be read, but neither hashed into a seed nor written to a file."""
    stem = os.fsdecode(b"caf\xe9")
    lay(tmp_path, *pair(stem), *pair("café"))
    rows, _ = read_folder(tmp_path, masks=False)
    assert [row.key for row in rows] == ["café"]
    found = sorted(complaints(tmp_path))
    assert [line.partition(": ")[0] for line in found] == list(pair(r"caf\udce9"))
    assert all("not UTF-8" in line and "rename it" in line for line in found)
    for name in (pair(stem)[1], "training_images/\ud800.png"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"image": name, "prompt": "x"}))
        (line,) = complaints(tmp_path)
        assert line.startswith("metadata.jsonl, line 1: image") and "rename it" in line
        line.encode()


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    lay(tmp_path / "set", *pair("a"))
    os.symlink(tmp_path / "set", tmp_path / "link")
    assert read(tmp_path / "link")[0].target == tmp_path / "link/training_images/a.png"


def write_table(folder: Path, kind: str, lines: list[dict[str, object]]) -> Path:
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8-sig")
        return path
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        for line in lines:
            writer.writerow({name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in line.items()})
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables(tmp_path: Path, kind: str) -> None:
    lay(tmp_path, "b.png", "in/a.jpg", "in/m.png", "in/x.png", "in/y.png", "unnamed.png")
    write_table(
        tmp_path,
        kind,
        [
            {
                "image": "./b.png",
                "edit_image": "in/x.png",
                "prompt": 'a "new" hat,\nred',
                "mask": "in/m.png",
                "width": 3,
            },
            {"image": "in/a.jpg", "edit_image": ["in/x.png", "in/y.png"], "prompt": ""},
            {"image": "b.png", "prompt": " again "},
        ],
    )
    rows = read(tmp_path, masks=True)
    assert [(row.key, row.target_name, row.reference_names, row.prompt, row.mask_name) for row in rows] == [
        ("b.png", "b.png", ("in/x.png",), 'a "new" hat,\nred', "in/m.png"),
        ("b.png#2", "b.png", (), " again ", None),
        ("in/a.jpg", "in/a.jpg", ("in/x.png", "in/y.png"), "", None),
    ]
    assert read(tmp_path)[0].mask is None


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("target", "reference", "prompt"),
    [
        ("image_path", "control_path_0", "caption"),
        ("file_name", "control", "text"),
        ("image", "control_path", "prompt"),
        ("output_file_name", "input_file_name", "text"),
    ],
)
def test_columns_of_other_tools(tmp_path: Path, kind: str, target: str, reference: str, prompt: str) -> None:
    lay(tmp_path, "a.png", "b.png")
    write_table(tmp_path, kind, [{target: "a.png", reference: "b.png", prompt: "hi"}])
    assert [(row.target_name, row.reference_names, row.prompt) for row in read(tmp_path)] == [
        ("a.png", ("b.png",), "hi")
    ]


def test_splits_of_an_imagefolder(tmp_path: Path) -> None:
    """Each has a folder with a table of its own; one that is a link out of the data set is none of it."""
    home = tmp_path / "set"
    for split, names in (("train", "abc"), ("test", "d")):
        lay(home / split, *(f"{name}.png" for name in names))
        write_table(home / split, "jsonl", [{"file_name": f"{name}.png", "text": split} for name in names])
    (home / "elsewhere").symlink_to(lay(tmp_path / "other", "metadata.jsonl"))

    def keys(**own: str) -> list[str]:
        return [row.key for row in read_sets(DatasetArguments(dataset_path=[DataEntry(path=str(home), **own)]),
                                             masks=False)[0]]  # fmt: skip

    assert keys() == ["a.png", "b.png", "c.png"] and keys(split="test") == ["d.png"]
    assert keys(split="elsewhere") == keys(split="dev") == []


def test_numbered_columns_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(12)]
    lay(tmp_path, "t.png", *names)
    columns = {f"control_path_{number}": names[number] for number in (11, *range(11))}
    write_table(tmp_path, "jsonl", [{"image": "t.png", "prompt": "", **columns}])
    assert read(tmp_path)[0].reference_names == tuple(names)


WRONG_LINES: list[tuple[dict[str, object], str]] = [
    ({"prompt": ""}, "none of image, file_name, image_path, path_target, output_file_name given"),
    ({"image": "a.png"}, "none of prompt, caption, text given"),
    ({"image": "a.png", "prompt": None}, "none of prompt, caption, text given"),
    ({"image": "a.png", "prompt": 3}, "prompt is 3, not a text"),
    (
        {"image": "a.png", "file_name": "b.png", "prompt": ""},
        "several of image, file_name, image_path, path_target, output_file_name given",
    ),
    ({"image": "c.png", "prompt": ""}, "image 'c.png': no such file"),
    ({"image": "sub", "prompt": ""}, "image 'sub': a folder, not a file"),
    ({"image": "none/c.png", "prompt": ""}, "image 'none/c.png': none is no such folder"),
    ({"image": "a.png", "prompt": "", "control": ["a.png", 7]}, "control is 7, not the path of a file"),
    ({"image": "a.png", "prompt": "", "control": "a.png", "control_path_0": "a.png"}, "both control and control_p"),
    ({"image": "a.png", "promt": ""}, "unknown column 'promt'; did you mean 'prompt'?"),
    ({"image": "../set/a.png", "prompt": ""}, "image '../set/a.png': leaves the data set's folder"),
    ({"image": "sub/../../out/c.png", "prompt": ""}, "image 'sub/../../out/c.png': leaves the data set's folder"),
    ({"image": "OUT/c.png", "prompt": ""}, "leaves the data set's folder"),
    ({"image": "link.png", "prompt": ""}, "image 'link.png': a link that leaves the data set's folder"),
    ({"image": "away/c.png", "prompt": ""}, "image 'away/c.png': away is a link that leaves the data set's folder"),
    ({"image": "away/deep/c.png", "prompt": ""}, "away/deep is a link that leaves the data set's folder"),
]


@pytest.mark.parametrize(
    ("kind", "line", "problem"),
    [
        (kind, line, problem)
        for line, problem in WRONG_LINES
        for kind in ("jsonl", "csv")
        if kind == "jsonl" or all(isinstance(cell, str) for cell in line.values())  # a cell of CSV is always text
    ],
)
def test_wrong_lines(tmp_path: Path, kind: str, line: dict[str, object], problem: str) -> None:
    folder, outside = lay(tmp_path / "set", "a.png", "b.png", "sub/d.png"), lay(tmp_path / "out", "c.png", "deep/c.png")
    os.symlink(outside / "c.png", folder / "link.png")
    os.symlink(outside, folder / "away")
    line = {name: str(outside / "c.png") if cell == "OUT/c.png" else cell for name, cell in line.items()}
    write_table(folder, kind, [line])
    (found,) = complaints(folder)
    assert found.startswith(f"metadata.{kind}, line {1 if kind == 'jsonl' else 2}: ")
    assert problem in found


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metadata.jsonl", b'{"image": "a.png"\n[1]\n', "metadata.jsonl, line 1: not JSON"),
        ("metadata.jsonl", b"[1]\n", "metadata.jsonl, line 1: not an object"),
        (
            "metadata.jsonl",
            b'{"image": "a.png", "prompt": "\xff"}',
            "metadata.jsonl: cannot be read as a table in UTF-8",
        ),
        ("metadata.jsonl", b"\n", "no samples in metadata.jsonl"),
        ("metadata.csv", b"image,prompt\na.png\n", "metadata.csv, line 2: not as many cells"),
        ("metadata.csv", b"image,prompt\na.png,red, blue\n", "metadata.csv, line 2: not as many cells"),
        ("metadata.csv", b'image,prompt\na.png,"red\n', "metadata.csv: cannot be read as a table"),
        ("metadata.csv", b"image,control,prompt\na.png,[a.png],red\n", "control begins like a list but is not one"),
    ],
)
def test_damaged_tables(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    lay(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content)
    assert problem in complaints(tmp_path)[0]


def test_two_tables_are_one_too_many(tmp_path: Path) -> None:
    lay(tmp_path, "metadata.csv", "metadata.jsonl")
    assert complaints(tmp_path) == [f"{tmp_path}: has metadata.jsonl and metadata.csv; keep one"]


def test_a_table_that_cannot_be_read_is_the_refusal(tmp_path: Path) -> None:
    """The sub-folders beside it hold other samples, perhaps older ones."""
    folder, away = lay(tmp_path / "set", *pair("a")), lay(tmp_path / "away", "metadata.jsonl")
    os.mkfifo(folder / "metadata.jsonl")
    assert complaints(folder) == ["metadata.jsonl: neither a file nor a folder; the samples would be read from it"]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").symlink_to(away / "metadata.jsonl")
    assert complaints(folder)[0].startswith("metadata.csv: a link that leaves the data set's folder")


@pytest.mark.parametrize("column", ["width", "prompt"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("1" * 6000, ""),
        ("-1e" + "9" * 400, ""),
        ("[" * 200_000 + "]" * 200_000, "brackets nested too deep"),
        (r'"\ud83d"', r"prompt has half a character ('\ud83d') at place 0"),
        ('"' + "x" * 1_000_001 + '"', "prompt has 1000001 characters; a caption has at most 1000000"),
    ],
    ids=["whole number", "number", "nesting", "half a character", "long"],
)
def test_values_without_limits(tmp_path: Path, column: str, value: str, problem: str) -> None:
    lay(tmp_path, "a.png")
    fields = '"image": "a.png"' + ("" if column == "prompt" else ', "prompt": ""')
    (tmp_path / "metadata.jsonl").write_text(f'{{{fields}, "{column}": {value}}}')
    found = complaints(tmp_path)
    if column == "prompt":
        assert (problem or "not a text") in found[0]
    else:
        assert found == [] or ("nested" in found[0] and "nested" in problem)


def test_a_line_without_an_end(tmp_path: Path) -> None:
    with open(tmp_path / "metadata.jsonl", "w") as file:
        file.truncate(20_000_000)
    assert complaints(tmp_path) == ["metadata.jsonl, line 1: longer than 16000000 characters"]


@pytest.mark.parametrize(("separator", "word"), [(";", "semicolons"), ("\t", "tabs")])
def test_tables_of_other_separators(tmp_path: Path, separator: str, word: str) -> None:
    lay(tmp_path, "a.png", "b.png")
    lines = [["image", "control", "prompt"], ["a.png", "b.png", "a hat, red"]]
    (tmp_path / "metadata.csv").write_text("\n".join(separator.join(line) for line in lines))
    assert f"its cells are separated by {word}; save it with commas" in complaints(tmp_path)[0]


def test_names_that_read_the_same_are_the_same(tmp_path: Path) -> None:
    """A Mac may write an accent as a character of its own; Windows and most programs do not."""
    one, two = "Caf\u00e9", "Cafe\u0301"
    lay(tmp_path, f"control_images/{two}.jpg", f"training_images/{one}.png", f"training_images/{two}.txt")
    (row,) = read(tmp_path)
    assert (row.key, row.reference_names) == (one, (f"control_images/{two}.jpg",))
    assert row.caption is not None and row.caption.is_file() and row.target.is_file()
    lay(tmp_path, f"training_images/{two}.png")
    assert "has the same stem (accents composed in another way); keep one" in complaints(tmp_path)[0]


def test_a_table_may_spell_a_name_otherwise(tmp_path: Path) -> None:
    one, two = "Caf\u00e9", "Cafe\u0301"
    lay(tmp_path, f"{two}/{one}.png")
    write_table(tmp_path, "jsonl", [{"image": f"{one}/{two}.png", "prompt": ""}])
    assert read(tmp_path)[0].target_name == f"{two}/{one}.png"


def test_a_caption_under_another_ending_is_mentioned(tmp_path: Path) -> None:
    lay(tmp_path, *pair("a"), "training_images/a.caption", "training_images/b.png", "control_images/b.png")
    (tmp_path / "training_images/a.txt").unlink()
    first, second = complaints(tmp_path)
    assert first.endswith(
        "a.txt is missing beside it (it may be empty); there is a.caption: rename it if it is the caption"
    )
    assert second.endswith("b.txt is missing beside it (it may be empty)")
