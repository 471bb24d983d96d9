"""A run whose files are torn, or would be written over: one clear error, exit code 2, and nothing changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.disk.files import staged_folder
from qwen_image_finetune.disk.runs import claim_version

CONFIG = "model:\n  pretrained_model_name_or_path: nowhere\ndata:\n  init_args:\n    dataset_path: nowhere\n"
BEST = '{"step": 5, "checkpoint": "checkpoint-0-5", "losses": [1.0]}\n'


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """What a run leaves behind, written without one."""
    run = claim_version(tmp_path / "project")
    for name, text in {"config.yaml": CONFIG, "environment.json": '{"packages": {}}\n', "best.json": BEST}.items():
        (run.path / name).write_text(text)
    run.record(5, {"loss": 1.0})
    with staged_folder(run.checkpoint_path(0, 5)) as folder:
        save_file({"a.lora_A.weight": torch.zeros(1, 1)}, folder / "pytorch_lora_weights.safetensors")
    run.finish("finished", 5)
    run.close()
    return run.path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


TORN = [
    ("config.yaml", CONFIG[:30], "config.yaml"),
    ("config.yaml", CONFIG[: CONFIG.index("data")], "config.yaml is damaged: it lacks data.init_args.dataset_path"),
    ("config.yaml", "", "config.yaml is empty"),
    ("best.json", BEST[:20], "best.json is damaged"),
    ("best.json", "[]", "best.json is damaged"),
    ("environment.json", '{"pack', "environment.json is damaged"),
    ("environment.json", "[" * 100_000, "environment.json is damaged"),
    ("metrics.jsonl", '{"step": 5, "loss": "much"}\n', "metrics.jsonl is damaged: a value of step 5"),
    ("metrics.jsonl", '{"step": 5, "loss": null}\n', "metrics.jsonl is damaged: a value of step 5"),
    ("evaluation/evaluation.json", "[1]", "evaluation.json is damaged"),
]


@pytest.mark.parametrize(("name", "text", "words"), TORN)
def test_torn_files_are_one_clear_error(
    version: Path, name: str, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(version)]) == 0
    assert main(["compare", str(version), str(version), "--output", str(version.parent / "page.html")]) == 0
    (version / name).parent.mkdir(exist_ok=True)
    (version / name).write_text(text)
    capsys.readouterr()
    assert words in refused(capsys, "report", version)
    assert words in refused(capsys, "compare", version, version, "--output", version.parent / "page.html")


def test_verbs_do_not_write_over_a_run(version: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = version / "checkpoint-0-5" / "pytorch_lora_weights.safetensors"
    before = {path: path.read_bytes() for path in version.rglob("*") if path.is_file()}
    (tmp_path / "mine.safetensors").touch()
    (tmp_path / "mine.html").touch()
    export = ("export", version, "--family", "FluxKontext")
    for flags in ((), ("--overwrite",)):
        assert "belongs to the run" in refused(capsys, "report", version, "--output", version / "config.yaml", *flags)
        page = version / "run.json"
        assert "belongs to the run" in refused(capsys, "compare", version, version, "--output", page, *flags)
        assert "belongs to the run" in refused(capsys, *export, weights, *flags)
    assert "with --overwrite" in refused(capsys, *export, tmp_path / "mine.safetensors")
    assert "with --overwrite" in refused(capsys, "report", version, "--output", tmp_path / "mine.html")
    assert "a file is to be written" in refused(capsys, "report", version, "--output", tmp_path)
    assert "ends in .safetensors" in refused(capsys, *export, tmp_path / "x.bin")
    assert {path: path.read_bytes() for path in version.rglob("*") if path.is_file()} == before
    for _ in range(2):  # its own page
        assert main(["report", str(version)]) == 0
    assert main(["report", str(version), "--output", str(tmp_path / "mine.html"), "--overwrite"]) == 0
