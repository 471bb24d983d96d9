"""Captions that a model proposes are read by a person before they are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from qwen_image_finetune.studio import captioning
from qwen_image_finetune.studio.jobs import Jobs
from qwen_image_finetune.studio.queue import Queue
from qwen_image_finetune.studio.shelf import Refused, Shelf

TOY = Path(__file__).parents[2] / "toy/qwen-image-edit"
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture
def model(folder: Path) -> str:
    """The toy's encoder is a small model of this kind; it has learnt to read, and writes what comes."""
    for part in ("text_encoder", "processor"):
        shutil.copytree(TOY / part, folder / "writer", dirs_exist_ok=True)
    (folder / "writer/chat_template.jinja").write_text(TEMPLATE)
    return "writer"


def test_proposals_are_no_captions(
    client: TestClient, folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioning, "LONGEST", 4)
    monkeypatch.setattr(captioning, "SIDE", 56)
    (folder / "faces/training_images/2.txt").write_text("")
    shelf = Shelf(folder)
    writer = captioning.Writer(captioning.model_place(shelf, model))
    found = captioning.propose(shelf, "faces", writer, only_empty=True)
    assert list(found) == ["2"]
    assert found["2"]
    assert captioning.read_proposals(shelf, "faces") == found
    assert (folder / "faces/training_images/2.txt").read_text() == ""
    captioning.proposals_file(shelf, "faces").write_text('{"2": "<b>add</b> a hat", "1": "edit number 1"}')
    page = client.get("/data?set=faces").text
    assert "&lt;b&gt;add&lt;/b&gt; a hat" in page
    assert page.count("data-proposal>") == 1, "what is the caption already is not proposed"


def test_a_model_that_cannot_be_asked_is_refused(folder: Path, model: str) -> None:
    (folder / "writer/chat_template.jinja").unlink()
    with pytest.raises(Refused, match="no chat template"):
        captioning.Writer(str(folder / "writer"))


def test_a_job_names_a_model_in_the_folder_or_on_the_hub(
    client: TestClient, folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Queue, "tick", lambda self: None)
    for name in ("/etc", "../outside", "~/model", "nothing", "https://attacker.example/model", "--help", ""):
        assert client.post("/data/propose", json={"set": "faces", "model": name}).status_code in (400, 404)
    for name, place in ((model, str(folder.resolve() / "writer")), ("Qwen/Qwen2.5-VL-7B-Instruct",) * 2):
        told = client.post("/data/propose", json={"set": "faces", "model": name}).json()
        job = Jobs(Shelf(folder)).of(told["job"])
        assert job.steps[0].arguments[1:] == ["faces", place, "empty"]
        assert client.get(told["address"]).status_code == 200
