"""A data set on the page: captions, the bin, what does not fit, what is noted, and that text stays text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from qwen_image_finetune.data.sources import read_folder
from qwen_image_finetune.disk.files import DiskFull
from qwen_image_finetune.studio import looking, pairs
from qwen_image_finetune.studio.pairs import Change
from qwen_image_finetune.studio.routes_common import Studio
from qwen_image_finetune.studio.shelf import Shelf

SCRIPT = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


def caption_of(folder: Path, key: str) -> str:
    return (folder / f"faces/training_images/{key}.txt").read_text().strip()


def test_a_caption_is_text(client: TestClient, folder: Path) -> None:
    client.post("/data/caption", json={"set": "faces", "key": "0", "before": "edit number 0", "after": SCRIPT})
    assert caption_of(folder, "0") == SCRIPT
    page = client.get("/data?set=faces").text
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert" in page


def test_names_are_text(client: TestClient, folder: Path) -> None:
    os.rename(folder / "faces", folder / "<b onmouseover=alert(1)>")
    for address in ("/", "/data?set=%3Cb%20onmouseover%3Dalert(1)%3E", "/new?set=%3Cb%20onmouseover%3Dalert(1)%3E"):
        answer = client.get(address)
        assert answer.status_code == 200
        assert "<b onmouseover" not in answer.text
    refused = client.get("/data?set=%3Cscript%3Ealert(1)%3C/script%3E", headers={"accept": "text/html"})
    assert "<script>alert" not in refused.text


def test_two_tabs_do_not_overwrite_each_other(client: TestClient, folder: Path) -> None:
    first = {"set": "faces", "key": "1", "before": "edit number 1", "after": "mine"}
    assert client.post("/data/caption", json=first).status_code == 200
    second = client.post("/data/caption", json={**first, "after": "theirs"})
    assert second.status_code == 409
    assert "changed elsewhere" in second.json()["error"]
    assert caption_of(folder, "1") == "mine"


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_captions_of_a_table_are_edited_there(table: str, client: TestClient, folder: Path) -> None:
    """One line changes; the others stay as they were, columns of other tools included."""
    (folder / "told").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(folder / f"told/{name}.png")
    lines = {
        "metadata.jsonl": ['{"image":"a.png", "prompt": "one\u2028two", "score": 1e3}', "",
                           '{"image": "b.png", "text": ""}', '{"image": "a.png", "caption": "again"}'],
        "metadata.csv": ["image,prompt,score", '"a.png","one, two",1e3', "b.png,,", "a.png,again,7"],
    }[table]  # fmt: skip
    file = folder / "told" / table
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def edit(key: str, before: str, after: str) -> int:
        asked = {"set": "told", "key": key, "before": before, "after": after}
        return client.post("/data/caption", json=asked).status_code

    assert edit("a.png#2", "again", 'says "now",\nin two lines') == 200
    assert edit("b.png", "", SCRIPT) == 200
    assert edit("b.png", "", "lost") == 409
    rows, problems = read_folder(folder / "told", masks=False)
    assert problems == [] and {row.key: row.prompt for row in rows} == {
        "a.png": "one\u2028two" if table.endswith("l") else "one, two",
        "a.png#2": 'says "now",\nin two lines', "b.png": SCRIPT,
    }  # fmt: skip
    written = file.read_text(encoding="utf-8")
    assert "1e3" in written and (table.endswith("csv") or written.startswith(lines[0] + "\n\n"))
    many = {"set": "told", "keys": [], "find": "", "replace": "", "prefix": "p ", "suffix": ""}
    assert client.post("/data/captions", json={**many, "write": True}).status_code == 200
    assert all((row.prompt or "").startswith("p ") for row in read_folder(folder / "told", masks=False)[0])
    page = client.get("/data?set=told").text
    assert "readonly" not in page and "Change captions" in page


def test_a_caption_is_written_whole_or_not_at_all(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: str) -> None:
        raise DiskFull(path, len(data))

    monkeypatch.setattr(pairs, "write_atomic", full)
    answer = client.post("/data/caption", json={"set": "faces", "key": "0", "before": "edit number 0", "after": "x"})
    assert answer.status_code == 507
    assert "no space left" in answer.json()["error"]
    assert caption_of(folder, "0") == "edit number 0"


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (Change(prefix="photo, "), "a cat", "photo, a cat"),
        (Change(prefix="photo, "), "photo, a cat", "photo, a cat"),
        (Change(suffix=", at night"), "a cat", "a cat, at night"),
        (Change(find="cat", replace="dog"), "cat and cat", "dog and dog"),
        (Change(find=".*", replace="x"), "a .* b", "a x b"),
        (Change(find="a cat", prefix="empty: "), "a cat", "empty:"),
        (Change(), " a cat ", "a cat"),
    ],
)
def test_changes_of_many_captions(change: Change, before: str, after: str) -> None:
    assert change.of(before) == after


def test_many_captions_are_shown_before_they_are_written(client: TestClient, folder: Path) -> None:
    ask = {"set": "faces", "prefix": "light, ", "keys": ["0", "2"]}
    told = client.post("/data/captions", json=ask).json()
    assert told["changes"] == 2
    assert told["shown"][0] == {"key": "0", "before": "edit number 0", "after": "light, edit number 0"}
    assert caption_of(folder, "0") == "edit number 0"
    assert client.post("/data/captions", json={**ask, "write": True}).json() == {"changed": 2}
    assert [caption_of(folder, key) for key in "012"] == [
        "light, edit number 0",
        "edit number 1",
        "light, edit number 2",
    ]


def test_the_bin_takes_all_of_a_pair_and_gives_it_back(client: TestClient, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "faces").rglob("*") if path.is_file()}
    thrown = client.post("/data/throw", json={"set": "faces", "keys": ["3"]}).json()["thrown"]
    rows, problems = read_folder(folder / "faces", masks=True)
    assert [row.key for row in rows] == ["0", "1", "2", "4"]
    assert problems == []
    assert "3 of faces" in client.get("/bin").text
    assert client.post("/bin/restore", json={"id": thrown[0]}).status_code == 200
    assert {path.name: path.read_bytes() for path in (folder / "faces").rglob("*") if path.is_file()} == before
    client.post("/data/throw", json={"set": "faces", "keys": ["3"]})
    assert client.post("/bin/empty", json={}).json() == {"emptied": 1}
    assert "The bin is empty" in client.get("/bin").text


def test_the_bin_never_overwrites(client: TestClient, folder: Path) -> None:
    thrown = client.post("/data/throw", json={"set": "faces", "keys": ["3"]}).json()["thrown"]
    (folder / "faces/training_images/3.txt").write_text("a newer one")
    answer = client.post("/bin/restore", json={"id": thrown[0]})
    assert answer.status_code == 400
    assert (folder / "faces/training_images/3.txt").read_text() == "a newer one"


def test_halves_are_shown_and_joined(client: TestClient, folder: Path) -> None:
    os.rename(folder / "faces/control_images/2.png", folder / "faces/control_images/two.png")
    page = client.get("/data?set=faces").text
    assert "What does not fit yet" in page
    ask = {"set": "faces", "before": "faces/control_images/two.png", "after": "faces/training_images/2.png"}
    assert client.post("/data/join", json=ask).json() == {"name": "faces/control_images/2.png"}
    assert "What does not fit yet" not in client.get("/data?set=faces").text
    assert client.post("/data/join", json=ask).status_code == 409


def test_missing_captions_are_written(client: TestClient, folder: Path) -> None:
    (folder / "faces/training_images/4.txt").unlink()
    assert "1 picture has no caption" in client.get("/data?set=faces").text
    client.post("/data/add-captions", json={"set": "faces", "caption": "do it"})
    assert [caption_of(folder, key) for key in "04"] == ["edit number 0", "do it"]


def test_notes_are_those_of_the_check(folder: Path, write_pairs: Callable[..., Path]) -> None:
    """One flaw of each kind; what is looked at again only where it has changed."""
    faces = folder / "faces"
    (faces / "training_images/0.txt").write_text("")
    Image.open(faces / "training_images/1.png").save(faces / "control_images/1.png")
    Image.new("RGB", (90, 30), "red").save(faces / "control_images/2.png")
    for side in ("control_images", "training_images"):
        (faces / side / "3.png").write_bytes((faces / side / "4.png").read_bytes())
    (faces / "training_images/3.txt").write_text("edit number 4")
    (faces / "training_images/3_mask.png").write_bytes((faces / "training_images/4_mask.png").read_bytes())
    notes = looking.look_through(Shelf(folder), "faces")
    assert {key: sorted(set(row["notes"]) - {"small"}) for key, row in notes.rows.items()} == {
        "0": ["empty"],
        "1": ["unchanged"],
        "2": ["ratio"],
        "3": [],
        "4": ["copy"],
    }
    assert all("small" in row["notes"] for row in notes.rows.values())
    (faces / "training_images/2.png").write_bytes(b"damaged")
    assert "damaged" in looking.look_through(Shelf(folder), "faces").of("2")


def test_notes_are_filters(client: TestClient, folder: Path) -> None:
    (folder / "faces/training_images/0.txt").write_text("")
    looking.look_through(Shelf(folder), "faces")
    page = client.get("/data?set=faces&only=empty").text
    assert page.count("data-key=") == 1
    assert client.get("/data?set=faces&search=number 2").text.count("data-key=") == 1


def test_ten_thousand_pairs_come_page_by_page(client: TestClient, folder: Path) -> None:
    big = folder / "big"
    for side in ("control_images", "training_images"):
        (big / side).mkdir(parents=True)
    for number in range(500):
        for name in (
            f"control_images/{number:05}.png",
            f"training_images/{number:05}.png",
            f"training_images/{number:05}.txt",
        ):
            (big / name).touch()
    page = client.get("/data?set=big&page=2").text
    assert page.count("data-key=") == 48
    assert "page 2 of 11" in page


def test_thumbnails_are_made_once(studio: Studio, client: TestClient, folder: Path) -> None:
    address = "/thumbnail?side=160&picture=faces/training_images/0.png"
    first = client.get(address)
    assert first.headers["content-type"] == "image/webp"
    kept = list((folder / ".studio/thumbs").rglob("*.webp"))
    assert len(kept) == 1
    changed = kept[0].stat().st_mtime_ns
    assert client.get(address).content == first.content
    assert kept[0].stat().st_mtime_ns == changed
    Image.new("RGB", (64, 48), "blue").save(folder / "faces/training_images/0.png")
    assert client.get(address).content != first.content


def test_a_hundred_requests_at_once(client: TestClient) -> None:
    from concurrent.futures import ThreadPoolExecutor

    addresses = ["/", "/data?set=faces", "/thumbnail?side=320&picture=faces/training_images/1.png", "/queue"] * 25
    with ThreadPoolExecutor(20) as pool:
        assert {answer.status_code for answer in pool.map(client.get, addresses)} == {200}
