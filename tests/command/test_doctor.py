"""`qif doctor`: what is tried, what is said, and what a failure looks like."""

import json
import re
from pathlib import Path

import pytest
import torch

from qwen_image_finetune.command import doctor
from qwen_image_finetune.command.cli import main

LOCK = Path(__file__).parents[2] / "requirements.lock"


def test_what_was_tested_is_what_the_lock_says() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE))
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED


def test_the_report_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = {each["name"]: each for each in json.loads(line)}
    assert found.keys() >= {"driver", "torch", "disk here", "attention flash", "attention math", "fp8 base",
                            "bitsandbytes", "compile", "login at the hub", "cache of the hub",
                            "version of diffusers"}  # fmt: skip
    assert torch.__version__ in found["torch"]["found"]
    for each in found.values():
        assert (each["state"] == "good") == (each["remedy"] == "")
    if not torch.cuda.is_available():  # torch has no such kernel for a CPU: tried, so known
        assert found["attention efficient"]["state"] == "note"
    assert found["attention math"]["found"] == found["fp8 base"]["found"] == "runs, forward and backward"


def test_what_is_missing_is_bad_and_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "TESTED", {"no-such-package-here": "1.0", "torch": "0.1"})
    monkeypatch.setattr(doctor, "_trials", lambda: iter(()))
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert re.search(
        r"^bad +version of no-such-package-here +not installed\n +-> .* -m pip install no-such-p", said.out, re.M
    )
    assert re.search(r"^note +version of torch .*\n +-> tests ran with 0.1", said.out, re.MULTILINE)
    assert said.err == "error: no run works here before this is mended: version of no-such-package-here\n"


def test_a_trial_that_fails_is_told_with_its_reason() -> None:
    def fails() -> None:
        raise RuntimeError("no kernel image is available\nmore of it")

    found = doctor._tried("compile", fails, "do without")
    assert (found.found, found.remedy, found.state) == (
        "does not run: no kernel image is available", "do without", "note"
    )  # fmt: skip
