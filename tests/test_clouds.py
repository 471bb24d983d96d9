"""What carries a run elsewhere: the container, and recipes for rented machines, with stand-ins for the clouds."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from qwen_image_finetune.command.arguments import build_parser
from qwen_image_finetune.command.cli import VERBS, parse

ROOT = Path(__file__).parent.parent
RENTED, MODAL = ROOT / "configs/cluster/rented.sh", ROOT / "configs/cluster/modal_app.py"


def test_the_container_copies_what_is_let_in() -> None:
    """What .dockerignore lets in becomes the wheel of tests/test_bare_install.py; the rest is checked here."""
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert [name for name in sorted(admitted) if not (ROOT / name).exists()] == []
    file = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(\S+) ", file, flags=re.MULTILINE)
    assert copied and all(name == "." or name in admitted for name in copied)
    user = re.findall(r"^USER (\d+)$", file, flags=re.MULTILINE)
    assert user and int(user[-1]) > 0  # a number: a cluster that forbids root can tell
    for words in re.findall(r"^(?:HEALTHCHECK .*CMD|CMD) \[(.+)\]$", file, flags=re.MULTILINE):
        verb = [word.strip(' "') for word in words.split(",")]
        assert verb == ["--help"] or parse(build_parser(VERBS), verb[1:])
    for line in re.findall(r"^#   docker run .* qif (\w+ .*)$", file, flags=re.MULTILINE):
        assert parse(build_parser(VERBS), shlex.split(line))


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., list[str]]:
    """`disk(*words)`: what the rented machine's start command does, a line for each thing it starts."""
    folder, programs = tmp_path / "workspace", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    (folder / "qwen_image_finetune-0.1.0-py3-none-any.whl").touch()
    inside = tmp_path / "inside"  # python of the environment
    inside.write_text('#!/bin/bash\necho "$@" >> "$TOLD"\n[ "$2" != pip ] || [ -z "${PIP_FAILS:-}" ]\n')
    outside = programs / "python3"
    outside.write_text(f'#!/bin/bash\nmkdir -p "$3/bin" && cp {inside} "$3/bin/python" && chmod +x "$3/bin/python"\n')
    outside.chmod(0o755)

    def start(*words: str, fails: bool = False) -> list[str]:
        told = tmp_path / "told"
        told.write_text("")
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "QIF_DISK": str(folder)}
        environment |= {"TOLD": str(told)} | ({"PIP_FAILS": "1"} if fails else {})
        done = subprocess.run(["bash", RENTED, *words], env=environment, check=False)
        assert (done.returncode != 0) == fails
        return told.read_text().splitlines()

    return start


def test_a_rented_machine_goes_on(disk: Callable[..., list[str]]) -> None:
    assert len(disk("train", "my_run.yaml", fails=True)) == 1  # taken away, or no network, while pip works
    install, doctor, train = disk("train", "my_run.yaml", "train.max_train_steps=7")
    assert re.fullmatch(r"-m pip install .* qwen_image_finetune-0\.1\.0-py3-none-any\.whl", install)
    assert doctor == "-m qwen_image_finetune.cli doctor"
    words = train.removeprefix("-m qwen_image_finetune.cli ").split()
    options = parse(build_parser(VERBS), words)
    assert options.overrides == ["train.max_train_steps=7", "train.resume_from_checkpoint=latest"]
    # Started again, nothing is installed twice; other verbs get no key of training.
    assert disk("check", "my_run.yaml") == [doctor, "-m qwen_image_finetune.cli check my_run.yaml"]


def test_modal_runs_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that Modal would call starts a run that goes on from its newest checkpoint."""
    modal = MagicMock(
        spec=ModuleType("modal"), App=MagicMock(), Image=MagicMock(), Volume=MagicMock(), Secret=MagicMock()
    )
    modal.App.return_value.function.return_value = lambda function: function
    monkeypatch.setitem(sys.modules, "modal", modal)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/qwen_image_finetune-0.1.0-py3-none-any.whl").touch()
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: started.append(command))
    app: dict[str, Any] = runpy.run_path(str(MODAL))
    app["train"]("model: {}", ["train.max_train_steps=7"])
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "qwen_image_finetune.cli"]
    options = parse(build_parser(VERBS), command[3:])
    assert options.config.read_text() == "model: {}" and options.overrides[-1] == "train.resume_from_checkpoint=latest"
    app["volume"].commit.assert_called_once()
