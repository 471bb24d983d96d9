"""`--json`: one document on standard output, whatever else is said; refusals too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config


@pytest.fixture
def answered(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """`answered(word, ...)`: exit code, the document, and what was said beside it."""

    def run(*words: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        (line,) = said.out.splitlines()
        return code, json.loads(line), said.err

    return run


def test_check(answered: Callable[..., Any], configure: Callable[..., Config], pairs: Path, tmp_path: Path) -> None:
    configure("FluxKontext")
    config = str(tmp_path / "config.yaml")
    code, found, said = answered("check", config, "--json", "validation.enabled=true", "validation.share=0.3")
    assert (code, found) == (0, {"family": "FluxKontext", "pairs": 5, "held_out": 2, "problems": []})
    assert "all readable" in said
    code, found, said = answered("check", config, "--json", "model.lora.target_modules=[nothing]", "train.trainer=X")
    assert code == 2 and "train.trainer" in found["error"] and found["problems"]
    (tmp_path / "broken/training_images").mkdir(parents=True)
    (tmp_path / "broken/training_images/0.png").write_bytes(b"no picture")
    (tmp_path / "broken/training_images/0.txt").touch()
    code, found, said = answered("check", config, "--json", f"data.init_args.dataset_path={tmp_path / 'broken'}",
                                 "model.lora.target_modules=[nothing]")  # fmt: skip
    assert code == 2 and len(found["problems"]) == 2, found
    assert any("0.png" in line for line in found["problems"]) and found["problems"][0] in said


def test_evaluate(answered: Callable[..., Any], configure: Callable[..., Config], pairs: Path, tmp_path: Path) -> None:
    configure("FluxKontext")
    words = (
        "evaluate",
        str(tmp_path / "config.yaml"),
        str(pairs),
        "--json",
        "--steps",
        "1",
        "--count",
        "2",
        "--output",
    )
    code, found, said = answered(*words, str(tmp_path / "measured"))
    assert code == 0 and found == json.loads((tmp_path / "measured/evaluation.json").read_text())
    assert "drawing: base" in said
    code, found, _ = answered(*words, str(pairs))
    assert code == 2 and "--overwrite" in found["error"]
