"""Which checkpoints a configuration may name, which family they are, and classes by import path."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_image_finetune.config import Config, ConfigError, import_class, load_config, resolve_family
from qwen_image_finetune.config.family import model_problems
from qwen_image_finetune.families import FAMILIES

KEY = "model.pretrained_model_name_or_path"


def configuration(model: str, trainer: str | None = None, revision: str | None = None) -> Config:
    return Config.model_validate({
        "model": {"pretrained_model_name_or_path": model, "revision": revision},
        "train": {"trainer": trainer},
    })  # fmt: skip


def checkpoint(folder: Path, pipeline: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def refusal(tmp_path: Path, model: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": {"pretrained_model_name_or_path": model}}))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen3-VL-8B", "Qwen/Qwen-VL"]
)
def test_language_model_is_named_as_one(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, name)
    assert f"{KEY}={name!r} is a language model" in message and "Qwen/Qwen-Image-Edit" in message


def test_folder_of_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "vl").mkdir()
    (tmp_path / "vl" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    message = refusal(tmp_path, str(tmp_path / "vl"))
    assert "model_type 'qwen2_vl'" in message and "Qwen/Qwen-Image-Edit" in message


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/at/all",
        "./nowhere",
        "../nowhere",
        "~/nowhere-at-all",
        "~nobody-here/x",
        "path/to/model",
        "a b/c",
        "x" * 5000,
        "..",
        "a/\0b",
    ],
)
def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert f"{KEY}=" in refusal(tmp_path, name)


def test_a_mistyped_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy/flux-kontext").mkdir(parents=True)
    (tmp_path / "Qwen").mkdir()
    message = refusal(tmp_path, "toy/flux_kontext")
    assert f"no folder {tmp_path}/toy/flux_kontext; did you mean {tmp_path}/toy/flux-kontext?" in message
    assert f"{tmp_path}/toy holds flux-kontext" in refusal(tmp_path, "./toy/else")
    assert model_problems("Qwen/Qwen-Image-Edit") == model_problems("someone/model") == []


def test_files_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    assert "is a file" in refusal(tmp_path, str(tmp_path / "weights.safetensors"))
    assert "has no model_index.json" in refusal(tmp_path, str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_says_its_family(tmp_path: Path, family: str) -> None:
    folder = str(checkpoint(tmp_path / "model", FAMILIES[family].pipeline))
    assert resolve_family(configuration(folder)) == (family, f"model_index.json of {folder}")
    assert resolve_family(configuration(folder, family))[0] == family


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_checkpoint_is_of_its_family(tiny_checkpoints: dict[str, Path], family: str) -> None:
    assert resolve_family(configuration(str(tiny_checkpoints[family])))[0] == family


def test_disagreement_with_train_trainer(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "model", "FluxKontextPipeline"))
    with pytest.raises(ConfigError, match=r"train\.trainer='QwenImageEdit' disagrees .* a FluxKontextPipeline"):
        resolve_family(configuration(folder, "QwenImageEdit"))


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", None, ["a", "b"]])
def test_unknown_pipeline_lists_the_supported_ones(tmp_path: Path, pipeline: Any) -> None:
    folder = str(checkpoint(tmp_path / "model", pipeline))
    with pytest.raises(ConfigError) as error:
        resolve_family(configuration(folder, "QwenImageEdit"))
    assert all(entry.pipeline in str(error.value) for entry in FAMILIES.values())


@pytest.mark.parametrize("content", ["{", "[]", b"\xff"])
def test_broken_model_index(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "model_index.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"model_index\.json"):
        resolve_family(configuration(str(tmp_path)))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub in `tmp_path`, offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_unreachable_checkpoint(hub_cache: Path) -> None:
    for download in (False, True):
        assert resolve_family(configuration("someone/model"), download) == (
            "QwenImageEdit",
            "assumed (checkpoint cannot be reached)",
        )
        assert resolve_family(configuration("someone/model", "FluxKontext"), download) == (
            "FluxKontext",
            "train.trainer",
        )


def test_cached_checkpoint_says_its_family(hub_cache: Path) -> None:
    repository = hub_cache / "models--someone--model"
    checkpoint(repository / "snapshots" / "abc", "FluxKontextPipeline")
    checkpoint(repository / "snapshots" / "def", "QwenImageEditPipeline")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "refs" / "other").write_text("def")
    assert resolve_family(configuration("someone/model")) == ("FluxKontext", "hub cache")
    assert resolve_family(configuration("someone/model", revision="other")) == ("QwenImageEdit", "hub cache")
    with pytest.raises(ConfigError, match="disagrees"):
        resolve_family(configuration("someone/model", "QwenImageEdit"))


# Classes.

OPTIMIZER = torch.optim.Optimizer


@pytest.mark.parametrize(
    "dotted", ["torch.optim.AdamW", "torch.optim.SGD", "bitsandbytes.optim.Adam8bit", "prodigyopt.Prodigy"]
)
def test_optimizers_of_the_guide(dotted: str) -> None:
    pytest.importorskip(dotted.partition(".")[0])
    found = import_class(dotted, "optimizer.class_path", OPTIMIZER)
    assert issubclass(found, OPTIMIZER) and found.__name__ == dotted.rpartition(".")[2]


@pytest.mark.parametrize(
    ("dotted", "words"),
    [
        ("os.system", "is not a subclass of torch.optim.optimizer.Optimizer"),
        ("builtins.eval", "is not a subclass"),
        ("subprocess.Popen", "is not a subclass"),
        ("torch.nn.Linear", "is not a subclass"),
        ("torch.optim.AdamX", "torch.optim has no AdamX; optimizer.class_path takes a subclass of"),
        ("torch.optim.Adamw", "did you mean AdamW?"),
        ("torch.optimm.AdamW", "there is no module torch.optimm"),
        ("nowhere_at_all.AdamW", "there is no module nowhere_at_all"),
    ],
)
def test_what_is_no_optimizer(dotted: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        import_class(dotted, "optimizer.class_path", OPTIMIZER)
    assert f"optimizer.class_path={dotted!r}" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import not_there_at_all", "importing broken_module needs not_there_at_all, not installed here"),
        ("from torch import not_there_at_all", "importing broken_module fails: cannot import name 'not_there_at_all'"),
    ],
)
def test_module_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str) -> None:
    (tmp_path / "broken_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=words):
        import_class("broken_module.Mine", "optimizer.class_path", OPTIMIZER)


def test_missing_extra_says_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "prodigyopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])  # nothing can be found any more
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "Path" in str(finder)])
    sys.path_importer_cache.clear()
    with pytest.raises(ConfigError, match=r"prodigyopt is not installed: pip install 'qwen-image-finetune\[prodigy\]'"):
        import_class("prodigyopt.Prodigy", "optimizer.class_path", OPTIMIZER)
