"""Nothing outside the folder is read or written, whatever the path, the link or the name in a zip says."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from qwen_image_finetune.studio.shelf import Refused, Shelf

OUTSIDE = (
    "../secret.png",
    "faces/../../secret.png",
    "faces/training_images/../../../secret.png",
    "/etc/passwd",
    "//etc/passwd",
    "..",
    ".",
    "..\\secret.png",
    "faces/link.png",
    "loop/secret.png",
    ".studio/token",
    "faces/.hidden.png",
    "faces/own.png",
    "\0",
    "~/secret.png",
)


@pytest.fixture(autouse=True)
def _links(folder: Path) -> None:
    """Links that lead out, and one that leads to the studio's own files."""
    os.symlink(folder.parent / "secret.png", folder / "faces/link.png")
    os.symlink(folder.parent, folder / "loop")
    (folder / ".studio").mkdir()
    (folder / ".studio/token").write_text("key")
    os.symlink(folder / ".studio/token", folder / "faces/own.png")
    (folder / "faces/.hidden.png").write_bytes(b"")


ADDRESSES = (
    "/picture?picture=", "/thumbnail?side=160&picture=", "/data?set=", "/watch?run=", "/report?run=", "/new?from=",
    "/compare?run=", "/try?run=", "/watch/live?run=", "/data/looked?set=", "/try/grid?job=",
    "/watch/sample?run=", "/watch/strip?run=", "/try/dropped?name=", "/try/drawn?job=", "/download?checkpoint=x&run=",
    "/inbox/picture?side=after&set=", "/inbox/picture?side=after&set=faces&name=",
)  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_address_shows_it(client: TestClient, name: str) -> None:
    for address in ADDRESSES:
        answer = client.get(address + quote(name))
        assert answer.status_code in (400, 404), (address, answer.text)
        assert b"root:" not in answer.content
        assert not answer.headers["content-type"].startswith("image/")


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name not in (".", "\0")])
def test_no_action_writes_it(client: TestClient, folder: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in folder.parent.iterdir() if path.is_file()}
    for address, ask in [
        ("/data/caption", {"set": name, "key": "0", "before": "", "after": "x"}),
        ("/data/throw", {"set": "faces", "keys": [name]}),
        ("/data/look", {"set": name}),
        ("/data/add-captions", {"set": name, "caption": "x"}),
        ("/inbox/accept", {"set": name}),
        ("/queue/continue", {"run": name}),
        ("/queue/withdraw", {"id": name}),
        ("/queue/stop", {"id": name}),
        ("/bin/restore", {"id": name}),
        ("/evaluate", {"run": name, "set": "faces"}),
        ("/try/draw", {"run": name, "picture": "faces/training_images/0.png", "prompt": "x", "checkpoints": [],
                       "strengths": []}),
    ]:  # fmt: skip
        answer = client.post(address, json=ask)
        assert answer.status_code in (400, 404), (address, answer.text)
    upload = client.post(
        f"/inbox/upload?set={name.encode().hex() if chr(0) in name else name}&name=a.png", content=b"x"
    )
    assert upload.status_code in (200, 400, 404)
    assert {path: path.read_bytes() for path in folder.parent.iterdir() if path.is_file()} == before


def test_a_new_set_stays_in_the_folder(client: TestClient, folder: Path) -> None:
    for name in ("../outside", "/tmp/outside", "a/../../outside", ".hidden"):
        client.post("/data/new", json={"name": name})
    assert sorted(path.name for path in folder.parent.iterdir()) == ["secret.png", "secret.txt", "shelf"]
    assert not (folder / ".hidden").exists()


def test_links_of_a_set_are_not_followed(client: TestClient, folder: Path) -> None:
    """A caption or a target that is a link to somewhere else is neither shown nor overwritten."""
    caption = folder / "faces/training_images/0.txt"
    caption.unlink()
    os.symlink(folder.parent / "secret.txt", caption)
    page = client.get("/data?set=faces").text
    assert "outside" not in page.replace("which lies outside", "")
    client.post("/data/caption", json={"set": "faces", "key": "0", "before": "outside", "after": "overwritten"})
    assert (folder.parent / "secret.txt").read_text() == "outside"


def test_files_of_a_run_that_are_links_are_not_read(client: TestClient, folder: Path) -> None:
    run = folder / "output/project/v0"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"state": "finished", "step": 3}')
    for name in ("config.yaml", "metrics.jsonl", "log.txt", "data.json"):
        os.symlink(folder.parent / "secret.txt", run / name)
    for address in (
        "/watch?run=output/project/v0",
        "/watch/live?run=output/project/v0",
        "/report?run=output/project/v0",
    ):
        answer = client.get(address)
        assert answer.status_code in (400, 404)
        assert "outside" not in answer.text.replace("out of this folder", "")


def test_names_inside_are_found(folder: Path) -> None:
    shelf = Shelf(folder)
    assert shelf.picture("faces/training_images/0.png") == folder.resolve() / "faces/training_images/0.png"
    assert shelf.found().data_sets == ["faces"]
    with pytest.raises(Refused):
        shelf.picture("faces/training_images/0.txt")


def test_no_link_to_a_folder_is_walked(folder: Path) -> None:
    os.symlink(folder, folder / "circle")
    assert Shelf(folder).found().data_sets == ["faces"]
