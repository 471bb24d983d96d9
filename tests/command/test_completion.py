"""TAB in a real shell: what bash offers is what the parser takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_image_finetune.command.cli import main

# As bash does when TAB is pressed behind the line in $1.
PRESS = """
eval "$(qif completion bash)"
COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9 COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
case "$1" in *" ") COMP_WORDS+=(""); COMP_CWORD=$((COMP_CWORD + 1));; esac
_python_argcomplete qif
printf '%s\\n' "${COMPREPLY[@]}"
"""


def offered(line: str, folder: Path) -> set[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", PRESS, "bash", line], cwd=folder, env=environment, capture_output=True,
                          text=True, check=True)  # fmt: skip
    return {word.strip() for word in done.stdout.splitlines()} - {""}


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "my_run.yaml").touch()
    (tmp_path / "notes.txt").touch()
    assert offered("qif pl", tmp_path) == {"plan"}
    files = offered("qif train ", tmp_path)
    assert files >= {"my_run.yaml"} and "notes.txt" not in files
    assert offered("qif train my_run.yaml train.blocks", tmp_path) == {"train.blocks_to_swap="}
    assert "--card" in offered("qif plan my_run.yaml --c", tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_that_the_shell_reads(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "qif" in script and "_ARGCOMPLETE" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    check = ["-n"] if shell != "fish" else ["--no-execute"]
    subprocess.run([shell, *check], input=script, text=True, check=True)
