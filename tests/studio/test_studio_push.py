"""Sending a run from the page: nothing that was not shown, nowhere else than said, and no word of the token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from qwen_image_finetune.config import Config
from qwen_image_finetune.studio import verbs
from qwen_image_finetune.studio.routes_common import Studio
from qwen_image_finetune.studio.shelf import Shelf

ASK = {"run": "output/night/v0", "repository": "somebody/night", "step": 2}


@pytest.fixture
def run(folder: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in the studio's folder; `qif push --dry-run` writes what the real one would, without loading torch."""
    path = folder / ASK["run"] if isinstance(ASK["run"], str) else folder
    (path / "checkpoint-0-2").mkdir(parents=True)
    (path / "config.yaml").write_text(configure("FluxKontext").to_yaml())
    (path / "run.json").write_text(json.dumps({"state": "finished", "step": 2}))

    def push(shelf: Shelf, verb: str, words: list[str]) -> str:
        assert verb == "push" and words[0] == str(path) and words[-1] == "--dry-run"
        (path / "hub").mkdir(exist_ok=True)
        (path / "hub/README.md").write_text(f"# for {words[1]}")
        return ""

    monkeypatch.setattr(verbs, "run", push)
    return path


def test_what_was_shown_is_sent(client: TestClient, studio: Studio, run: Path) -> None:
    shown = client.post("/push/show", json=ASK).json()
    assert shown["card"] == "# for somebody/night" and shown["files"] == [{"name": "README.md", "mib": 0.0}]
    assert not studio.jobs.all(), "nothing is sent by looking"
    answer = client.post("/push/send", json={**ASK, "shown": shown["shown"]})
    assert answer.status_code == 200, answer.text
    (job,) = studio.jobs.all()
    assert job.kind == "push" and not job.card
    assert job.steps[0].arguments == [str(run), "somebody/night", "--checkpoint", "2", "--yes"]


@pytest.mark.parametrize(
    "change", [{"repository": "else/where"}, {"public": True}, {"shown": "0" * 64}], ids=["where", "public", "guess"]
)
def test_something_else_is_not_sent(change: dict[str, object], client: TestClient, studio: Studio, run: Path) -> None:
    shown = client.post("/push/show", json=ASK).json()["shown"]
    assert client.post("/push/send", json={**ASK, "shown": shown, **change}).status_code == 409
    (run / "hub/README.md").write_text("another card")
    assert client.post("/push/send", json={**ASK, "shown": shown}).status_code == 409
    assert not studio.jobs.all()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"repository": "--public"}, 400), ({"repository": "a/b/c"}, 400), ({"repository": "a"}, 400),
        ({"repository": "a/b --yes"}, 400), ({"step": 7}, 404), ({"run": "../elsewhere"}, 404),
        ({"run": "faces"}, 404), ({"token": "hf_x"}, 400),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, object], status: int, client: TestClient, studio: Studio, run: Path) -> None:
    for path, more in (("/push/show", {}), ("/push/send", {"shown": "0"})):
        answer = client.post(path, json={**ASK, **change, **more})
        assert answer.status_code == status, answer.text
    elsewhere = client.post("/push/show", json=ASK, headers={"origin": "http://evil.example"})
    assert elsewhere.status_code == 403
    assert not studio.jobs.all()
