"""The form of a run: it has every key, says what is wrong where it is, and starts nothing that a page may not start."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from starlette.testclient import TestClient

from qwen_image_finetune.config import Config, load_config
from qwen_image_finetune.config.words import known_keys, section_of
from qwen_image_finetune.studio import form, keeper, verbs
from qwen_image_finetune.studio.shelf import Refused, Shelf

ROOT = Path(__file__).parents[2]


@pytest.fixture
def draft(folder: Path) -> str:
    (folder / "model").mkdir()
    (folder / "model/model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    return form.draft("model", "faces", "first run")


def test_the_form_has_every_key() -> None:
    """It is made from the declarations: a new key is in it at once, and a renamed one leaves no label behind."""
    plain = {key for key, about in known_keys().items() if section_of(about.annotation) is None}
    assert {knob.key for knob in form.knobs()} == plain | {form.RATE}
    assert set(form.FRONT) <= plain | {form.RATE}


def test_a_draft_is_a_run(draft: str, folder: Path) -> None:
    found = form.check(draft, Shelf(folder))
    assert found.problems == []
    assert found.config is not None
    assert found.config.data.init_args.dataset_path == "faces"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.max_train_steps", "many"),
        ("data.batch_size", "0"),
        ("model.quantize", "fp7"),
        ("validation.share", "2"),
        ("optimizer.class_path", "os.system"),
        ("data.class_path", "evil.Dataset"),
        ("data.init_args.dataset_path", "/etc"),
        ("data.init_args.dataset_path", "../outside"),
        ("data.init_args.dataset_path", "~/pictures"),
        ("model.pretrained_model_name_or_path", "/etc"),
        ("logging.output_dir", "/tmp"),
        ("logging.output_dir", "faces/../../x"),
        ("cache.cache_dir", "/tmp/cache"),
        ("model.lora.pretrained_weight", "../../secret.safetensors"),
        ("train.resume_from_checkpoint", "/checkpoint"),
    ],
)
def test_what_is_wrong_is_said_at_its_key(client: TestClient, draft: str, key: str, value: str) -> None:
    told = client.post("/new/check", json={"yaml": draft, "key": key, "value": value}).json()
    assert any(key in problem["keys"] for problem in told["problems"]), told["problems"]
    refused = client.post("/new/start", json={"yaml": told["yaml"]})
    assert refused.status_code == 400


def test_a_class_hidden_by_interpolation_is_found(draft: str, folder: Path) -> None:
    tree = yaml.safe_load(draft)
    tree["optimizer"]["class_path"] = "${logging.tracker_project_name}"
    tree["logging"]["tracker_project_name"] = "os.system"
    problems = form.check(yaml.safe_dump(tree), Shelf(folder)).problems
    assert any("terminal only" in problem.words for problem in problems)


def test_links_that_lead_out_are_no_data(draft: str, folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent)
    found = form.check(form.edited(draft, "data.init_args.dataset_path", "link"), Shelf(folder))
    assert found.config is None


def test_text_and_form_are_one(client: TestClient, draft: str) -> None:
    told = client.post("/new/check", json={"yaml": draft, "key": "model.lora.r", "value": "32"}).json()
    assert told["values"]["model.lora.r"] == "32"
    assert yaml.safe_load(told["yaml"])["model"]["lora"]["r"] == 32
    again = client.post("/new/check", json={"yaml": told["yaml"].replace("r: 32", "r: 8")}).json()
    assert again["values"]["model.lora.r"] == "8"
    gone = client.post("/new/check", json={"yaml": again["yaml"], "key": "model.lora.r", "value": ""}).json()
    assert "model.lora.r" not in gone["values"]
    size = client.post(
        "/new/check", json={"yaml": draft, "key": "data.init_args.image_size", "value": "[64, 64]"}
    ).json()
    assert yaml.safe_load(size["yaml"])["data"]["init_args"]["image_size"] == [64, 64]


def test_a_proposed_change_is_applied_at_once(client: TestClient, draft: str) -> None:
    keys = {"model.quantize": "nf4", "train.gradient_checkpointing": True, "train.keep_activations": 0.4,
            "cache.text_encoder_device": "cpu", "train.max_grad_norm": None}  # fmt: skip
    told = client.post("/new/change", json={"yaml": draft, "keys": keys}).json()
    assert told["problems"] == []
    tree = yaml.safe_load(told["yaml"])
    assert (tree["model"]["quantize"], tree["train"]["keep_activations"]) == ("nf4", 0.4)
    assert (tree["train"]["max_grad_norm"], tree["cache"]["text_encoder_device"]) == (None, "cpu")
    assert client.post("/new/change", json={"yaml": draft, "keys": {"os.system": "x"}}).status_code == 400


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "!!python/object:os.system {}", "model: {*x}", "\0", "a: &a [*a]"])
def test_no_text_breaks_the_form(client: TestClient, text: str) -> None:
    answer = client.post("/new/check", json={"yaml": text})
    assert answer.status_code == 200
    assert answer.json()["problems"]


def test_a_run_is_begun_from_one_before(folder: Path, draft: str) -> None:
    """Its own file has every default written out; the form shows what a person would have written."""
    config = form.check(draft, Shelf(folder)).config
    assert config is not None
    short = form.away_from_defaults(config.to_yaml())
    assert len(short.splitlines()) < 40 < len(config.to_yaml().splitlines())
    path = folder / "short.yaml"
    path.write_text(short)
    assert load_config(path) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("demo_*.yaml")), ids=lambda path: path.name)
def test_our_own_configurations_can_be_begun_from(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shelf = Shelf(ROOT)
    existed = shelf.own.exists()
    found = form.check(path.read_text(), shelf)
    if not existed:
        shelf.own.rmdir()
    assert found.problems == []
    assert isinstance(found.config, Config)


def test_modules_in_the_folder_are_not_imported(folder: Path) -> None:
    """A folder from somewhere else may hold a yaml.py: it must not run, whatever is started in there."""
    for name in ("yaml", "torch", "json", "qwen_image_finetune"):
        (folder / f"{name}.py").write_text("raise SystemExit('run from the folder')")
    with pytest.raises(Refused, match="does not exist"):
        verbs.run(Shelf(folder), "plan", ["nothing.yaml"])
    assert all("-P" in keeper.program(verb) for verb in ("train", "look"))


def test_a_run_waits_in_the_queue(client: TestClient, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_image_finetune.studio.queue import Queue

    monkeypatch.setattr(Queue, "tick", lambda self: None)
    told = client.post("/new/start", json={"yaml": draft}).json()
    assert told["address"].startswith("/watch?job=")
    assert "first run" in client.get("/").text
    page = client.get(told["address"])
    assert page.status_code == 200
    live = client.get("/watch/live", params={"job": told["job"]}).json()
    assert live["job"] == "waiting"
    assert client.post("/queue/withdraw", json={"id": told["job"]}).json() == {"gone": True}
    assert client.get("/watch/live", params={"job": told["job"]}).status_code == 404
