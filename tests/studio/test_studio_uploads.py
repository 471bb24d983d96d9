"""Files that are dropped onto a data set: which half of which pair they are, and what is refused."""

from __future__ import annotations

import io
import stat
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from qwen_image_finetune.studio import uploads
from qwen_image_finetune.studio.inbox import Inbox
from qwen_image_finetune.studio.shelf import Refused, Shelf


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(content, kind)
    return content.getvalue()


def zipped(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def send(client: TestClient, name: str, content: bytes, side: str = "", into: str = "faces") -> dict[str, object]:
    answer = client.post("/inbox/upload", params={"set": into, "name": name, "side": side}, content=content)
    found: dict[str, object] = answer.json()
    return found


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("cat.JPG", "before", ("before", "cat.jpg")),
        ("cat.png", "after", ("after", "cat.png")),
        ("cat.txt", "before", ("after", "cat.txt")),
        ("pairs/control_images/cat.png", None, ("before", "cat.png")),
        ("pairs/training_images/cat.png", "before", ("after", "cat.png")),
        ("control_images_2/cat.webp", None, ("before", "cat_control_2.webp")),
        ("cat_start.jpg", None, ("before", "cat.jpg")),  # fal
        ("cat_start2.jpg", None, ("before", "cat_control_1.jpg")),
        ("cat_end.jpg", None, ("after", "cat.jpg")),
        ("main/cat.png", None, ("after", "cat.png")),  # Civitai
        ("control_1/cat.png", None, ("before", "cat.png")),
        ("control_2/cat.png", None, ("before", "cat_control_1.png")),
        ("my cat-before.png", None, ("before", "my cat.png")),
        ("a\\b\\source\\cat.png", None, ("before", "cat.png")),
        ("../../../etc/cat.png", "after", ("after", "cat.png")),
        ("<script>.png", "after", ("after", "_script_.png")),
        ("häuser_日本.png", "after", ("after", "häuser_日本.png")),
        ("cat.png", None, (None, "cat.png")),
    ],
)
def test_where_a_file_belongs(name: str, side: uploads.Side | None, expected: tuple[str | None, str]) -> None:
    place = uploads.place_of(name, side)
    assert (place.side, place.name) == expected


@pytest.mark.parametrize(
    "name", ["cat.exe", ".cat.png", "cat.svg", "__MACOSX/cat.png", "...png", "cat", "cat.zip/x.html"]
)
def test_what_is_neither_picture_nor_caption(name: str) -> None:
    with pytest.raises(Refused):
        uploads.place_of(name, "after")


def test_pairs_find_each_other_and_join_the_set(client: TestClient, folder: Path) -> None:
    for side, kind in (("before", "JPEG"), ("after", "PNG")):
        assert send(client, f"new.{kind.lower()}", picture(kind=kind), side) == {"taken": 1, "refused": []}
    send(client, "lone.png", picture("blue"), "before")
    page = client.get("/data?set=faces").text
    assert "1 whole pair, 1 half" in page
    assert client.post("/inbox/accept", json={"set": "faces", "caption": "make it new"}).json() == {"added": 1}
    assert (folder / "faces/training_images/new.txt").read_text() == "make it new"
    assert (folder / "faces/control_images/new.jpeg").read_bytes() == picture(kind="JPEG")
    assert "6 pairs" in client.get("/data?set=faces").text
    assert [each.stem for each in Inbox(Shelf(folder), "faces").waiting()] == ["lone"]


def test_a_mismatch_is_shown_and_mended(client: TestClient, folder: Path) -> None:
    send(client, "a.png", picture("red"), "before")
    send(client, "b.png", picture("blue"), "after")
    assert "These lack their other half" in client.get("/data?set=faces").text
    assert client.post("/inbox/join", json={"set": "faces", "before": "a", "after": "b"}).status_code == 200
    client.post("/inbox/accept", json={"set": "faces", "caption": ""})
    assert (folder / "faces/control_images/b.png").read_bytes() == picture("red")
    again = client.post("/inbox/join", json={"set": "faces", "before": "a", "after": "b"})
    assert again.status_code == 409


def test_a_taken_name_gets_a_number(client: TestClient, folder: Path) -> None:
    before = (folder / "faces/training_images/0.png").read_bytes()
    for side in ("before", "after"):
        send(client, "0.png", picture(), side)
    send(client, "0.txt", b"\xef\xbb\xbfits own caption", "after")
    client.post("/inbox/accept", json={"set": "faces", "caption": "not this one"})
    assert (folder / "faces/training_images/0.png").read_bytes() == before
    assert (folder / "faces/training_images/0 2.txt").read_text() == "its own caption"
    assert (folder / "faces/control_images/0 2.png").exists()


def test_a_zip_of_both(client: TestClient) -> None:
    content = zipped(
        **{"set/x_start.png": picture(), "set/x_end.png": picture(), "set/x.txt": b"do it", "notes.pdf": b"?"}
    )
    told = send(client, "pairs.zip", content)
    assert told["taken"] == 3
    assert [name for name, _ in told["refused"]] == ["notes.pdf"]  # type: ignore[attr-defined]
    assert "1 whole pair" in client.get("/data?set=faces").text


def test_names_in_a_zip_lead_nowhere_else(client: TestClient, folder: Path) -> None:
    """Zip slip: names with .. and absolute ones; a link in place of a picture."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in (
            "../../../../escaped.png",
            "/tmp/escaped_studio.png",
            "..\\..\\escaped.png",
            "after/../../../e.png",
        ):
            archive.writestr(name, picture())
        link = zipfile.ZipInfo("after/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    inside = set(folder.parent.rglob("*"))
    told = send(client, "evil.zip", content.getvalue())
    assert ["after/link.png", "a link"] in told["refused"]  # type: ignore[operator]
    assert {path for path in set(folder.parent.rglob("*")) - inside if path.is_file()} <= set(
        (folder / ".studio/inbox").rglob("*")
    )
    assert not Path("/tmp/escaped_studio.png").exists()


def test_a_bomb_in_a_zip_is_stopped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LARGEST_PICTURE", 1_000_000)
    told = send(client, "bomb.zip", zipped(**{"after/bomb.png": bytes(50_000_000)}))
    assert told == {"taken": 0, "refused": [["after/bomb.png", "larger than 1 MiB"]]}


def test_a_zip_that_lies_about_its_sizes(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size in its directory says one byte: what comes out is counted."""
    monkeypatch.setattr(uploads, "LARGEST_PICTURE", 1_000_000)
    honest = zipped(**{"after/bomb.png": bytes(5_000_000)})
    lying = honest.replace((5_000_000).to_bytes(4, "little"), (1).to_bytes(4, "little"))
    assert lying != honest
    assert send(client, "liar.zip", lying)["taken"] == 0


def test_a_zip_with_too_much_in_it(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_ENTRIES", 3)
    told = send(client, "many.zip", zipped(**{f"after/{number}.png": b"" for number in range(4)}))
    assert told["taken"] == 0
    monkeypatch.setattr(uploads, "LARGEST_CONTENT", 1000)
    assert send(client, "big.zip", zipped(**{"after/a.png": bytes(2000)}))["taken"] == 0


def test_a_picture_of_too_many_pixels(client: TestClient) -> None:
    """A decompression bomb: a few kilobytes that would fill gigabytes."""
    header = b"\x89PNG\r\n\x1a\n"
    fields = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunks = [(b"IHDR", fields), (b"IDAT", zlib.compress(bytes(1000)))]
    for name, data in chunks:
        header += len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    told = send(client, "bomb.png", header, "after")
    assert told["taken"] == 0
    assert "pixels" in str(told["refused"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.png", b"<html><script>alert(1)</script></html>"),
        ("page.txt", b"\xff\xfe\x00bad"),
        ("empty.png", b""),
        ("half.png", picture()[:48]),
        ("not.zip", b"PK but no zip"),
    ],
)
def test_what_is_not_what_its_name_says(client: TestClient, folder: Path, name: str, content: bytes) -> None:
    assert send(client, name, content, "after")["taken"] == 0
    kept = [path for path in (folder / ".studio").rglob("*") if path.is_file() and "inbox" in path.parts]
    assert kept == []
    assert list((folder / ".studio/arriving").iterdir()) == []


def test_an_upload_has_an_end(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LARGEST_PICTURE", 1000)
    answer = client.post("/inbox/upload?set=faces&name=a.png&side=after", content=bytes(5000))
    assert answer.status_code == 413
    assert list((folder / ".studio/arriving").iterdir()) == []
