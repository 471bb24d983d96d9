"""`qif push` against a small server that speaks what huggingface_hub asks of the hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors import safe_open

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config
from qwen_image_finetune.disk.versions import LORA_WEIGHTS

REPOSITORY = "somebody/night"


class Hub(ThreadingHTTPServer):
    """Repositories with their files, large objects by their hash, and every request in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuses_commits = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        found = self.server.repositories.get(self.path.removeprefix("/api/models/"))
        if found is None:
            self.reply({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        else:
            self.reply({"id": REPOSITORY, "private": found["private"], "siblings": [], "tags": []})

    def do_PUT(self) -> None:
        self.server.asked.append(f"PUT {self.path}")
        data = self.body()
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self.reply({})

    def do_POST(self) -> None:
        assert self.headers["authorization"] == "Bearer hf_secret"
        self.server.asked.append(f"POST {self.path}")
        text = self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(text)
            private = asked.get("private", asked.get("visibility") == "private")
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            there = name in self.server.repositories
            self.server.repositories.setdefault(name, {"private": private, "files": {}})
            self.reply({"url": f"{self.server.address}/{name}"}, 409 if there else 200)
        elif self.path.endswith("/preupload/main"):
            large = (".safetensors", ".png")
            files = [{"path": one["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if one["path"].endswith(large) else "regular"}
                     for one in json.loads(text)["files"]]  # fmt: skip
            self.reply({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": one["oid"], "size": one["size"]}
                | ({} if one["oid"] in self.server.objects
                   else {"actions": {"upload": {"href": f"{self.server.address}/store/{one['oid']}"}}})
                for one in json.loads(text)["objects"]
            ]  # fmt: skip
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            if self.server.refuses_commits:
                self.reply({"error": "not now"}, 403)
                return
            files = self.server.repositories[REPOSITORY]["files"]
            for line in map(json.loads, text.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
            self.reply({"commitUrl": f"{self.server.address}/{REPOSITORY}/commit/1", "commitOid": "1" * 40})
        else:  # validation of the card's head
            self.reply({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path, write_pairs: Callable[..., Path]) -> Path:
    """A run of two steps that drew, was measured, and had a secret and places of this machine in its settings."""
    folder = tmp_path_factory.mktemp("push")
    write_pairs(folder / "pairs", [(64, 64)])
    held_out = write_pairs(folder / "held", [(64, 64), (64, 96)], seed=3)
    (held_out / "training_images" / "0.txt").write_text("night](http://evil) <script>")
    written = {
        "model": {"pretrained_model_name_or_path": str(flux_folder), "lora": {"r": 4, "lora_alpha": 4}},
        "data": {"init_args": {"dataset_path": str(folder / "pairs"), "resolution": 64}},
        "train": {"max_train_steps": 2, "checkpointing_steps": 1, "mixed_precision": "no"},
        "cache": {"use_cache": True, "cache_dir": str(folder / "cache")},
        "validation": {"enabled": True, "steps": 2, "num_inference_steps": 1, "dataset_path": str(held_out)},
        "logging": {"output_dir": str(folder / "output"), "report_to": "none", "tracker_project_name": "night"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    run = folder / "output/night/v0"
    assert main(["train", str(folder / "config.yaml")]) == 0
    assert main(["evaluate", str(run), "--steps", "1", "--checkpoints", "latest"]) == 0
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text + "# a comment\n")
    return run


def test_what_is_shown_is_what_is_sent(made: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["push", str(made), REPOSITORY, "--checkpoint", "latest"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not hub.asked, "nothing leaves before it was agreed to"
    assert main(words) == 2  # nobody to ask
    assert "say --yes" in capsys.readouterr().err and not hub.repositories

    hub.refuses_commits = True
    assert main([*words, "--yes"]) == 2
    assert "Push again: what has arrived is not sent twice" in capsys.readouterr().err
    sent = [line for line in hub.asked if line.startswith("PUT")]
    assert len(sent) == 3  # the weights, and two pictures
    hub.refuses_commits, hub.asked = False, []
    assert main([*words, "--yes"]) == 0
    assert not [line for line in hub.asked if line.startswith("PUT")]

    repository = hub.repositories[REPOSITORY]
    assert repository["private"] is True
    files = repository["files"]
    assert set(files) == {"README.md", "config.yaml", LORA_WEIGHTS, "samples/0.png", "samples/1.png"}
    assert all(f"MiB  {name}" in said for name in files)
    assert files["README.md"].decode().strip() in said
    assert files[LORA_WEIGHTS] == (made / "checkpoint-1-2" / LORA_WEIGHTS).read_bytes()
    with Image.open(made / "hub/samples/0.png") as strip:
        assert strip.size == (4 * 64, 64)  # before, base, tuned, wanted
    for name, content in files.items():
        assert str(made.parents[2]).encode() not in content, f"{name} tells where the run was"


def test_the_card_is_one_that_the_hub_reads(made: Path) -> None:
    assert main(["push", str(made), REPOSITORY, "--checkpoint", "latest", "--dry-run"]) == 0
    card = ModelCard.load(made / "hub/README.md")
    about = card.data.to_dict()
    assert about["library_name"] == "diffusers" and about["pipeline_tag"] == "image-to-image"
    assert {"lora", "diffusers", "image-to-image"} <= set(about["tags"])
    assert "base_model" not in about, "a folder of this machine is nothing to the hub"
    assert [one["output"]["url"] for one in about["widget"]] == ["samples/0.png", "samples/1.png"]
    assert about["widget"][0]["text"] == "night](http://evil) <script>"
    assert "<script>" not in card.text and "](http://evil)" not in card.text
    assert "Measured on held-out pairs" in card.text and "2 pairs" in card.text
    with safe_open(made / "hub" / LORA_WEIGHTS, "np") as file:
        assert file.metadata()["ss_steps"] == "2"


def test_what_the_hub_learns_of_the_base(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_image_finetune.judging.model_card import base_of, head, licence, told
    from qwen_image_finetune.judging.pages.reading import Version

    version = Version(made)
    version.settings["model.pretrained_model_name_or_path"] = "Qwen/Qwen-Image-Edit-2509"
    assert base_of(version) == "Qwen/Qwen-Image-Edit-2509"
    found = head(version, True, [], ["turn day into night", "turn day into night", "x"])
    assert found["base_model_relation"] == "adapter" and found["license"] == "apache-2.0"
    assert found["instance_prompt"] == "turn day into night"
    assert found["pipeline_tag"] == "image-to-image"
    version.settings["train.trainer"] = "QwenImage"
    assert head(version, True, [], [])["pipeline_tag"] == "text-to-image"
    other = licence("black-forest-labs/FLUX.1-Kontext-dev")
    assert other == {"license": "other", "license_name": "flux.1-dev-non-commercial",
                     "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev"}  # fmt: skip
    version.yaml = yaml.safe_dump({"optimizer": {"init_args": {"api_key": "abc", "lr": 1}}, "a": ["/home/me/x", "y"]})
    assert told(version) == {"optimizer": {"init_args": {"api_key": "(left out)", "lr": 1}}, "a": ["x", "y"]}


def test_what_is_refused(made: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    words = ["push", str(made), REPOSITORY, "--yes"]
    hub.repositories[REPOSITORY] = {"private": False, "files": {}}
    assert main(words) == 2
    assert "is public already: --public says" in capsys.readouterr().err
    assert main(["push", str(made), "night"]) == 2 and "OWNER/NAME" in capsys.readouterr().err
    assert main(["push", str(made), "a b/c"]) == 2 and "is no hub id" in capsys.readouterr().err
    assert main(["push", str(made), REPOSITORY, "--checkpoint", "7"]) == 2
    assert "has no checkpoint '7'" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    assert main(words) == 2 and "hf auth login" in capsys.readouterr().err


def test_a_full_fine_tune_is_sent_as_its_folder(configure: Callable[..., Config], tmp_path: Path) -> None:
    from qwen_image_finetune.training.train import train

    run = train(configure("FluxKontext", "model.lora=null", "train.max_train_steps=1"))
    assert run is not None and main(["push", str(run), REPOSITORY, "--dry-run"]) == 0
    card = ModelCard.load(run / "hub/README.md")
    assert card.data.to_dict()["tags"][0] == "diffusers" and 'subfolder="transformer"' in card.text
    sent = sorted(path.name for path in (run / "hub/transformer").iterdir())
    assert sent == sorted(path.name for path in (next(run.glob("checkpoint-*")) / "transformer").iterdir())
