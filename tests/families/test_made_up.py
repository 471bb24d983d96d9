"""A family is one file and one line: tests that iterate the registry pass on one that the package has never heard of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What a family goes through, and where it is tested. The registry of the other process has one more line.
JOURNEY = {
    "pipeline and LoRA file": ("families", "levers/test_timestep.py"),
    "cache and prediction": ("encoding/test_cache.py", "drawing/test_predict.py"),
    "training, resume, LoRA in and out": ("training/test_train.py", "training/test_data_parallel_wrap.py",
                                          "test_contract.py"),
    "validation and evaluation": ("training/test_validate.py", "judging/test_evaluate.py"),
}  # fmt: skip


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", JOURNEY)
def test_the_registrys_tests_pass(part: str) -> None:
    files = [f"tests/{place}" for place in JOURNEY[part]]
    # Learning one pair by heart says nothing of a family that its resumed runs do not.
    chosen = ["-p", "tests.families.made_up", "-k", "MadeUp and not overfitted", "-p", "no:cacheprovider", "-q"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, *files], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:]
