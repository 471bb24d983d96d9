"""Threads that wait do not run in circles, unless somebody chose that they do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_image_finetune.machine.threads import CHOICES, sleep_while_waiting

ROOT = Path(__file__).parents[2]


def test_who_has_chosen_is_left_alone() -> None:
    for name in CHOICES:
        chosen = {name: "1"}
        sleep_while_waiting(chosen)
        assert chosen == {name: "1"}
    unset = {"OMP_NUM_THREADS": "4"}
    sleep_while_waiting(unset)
    assert unset == {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's library says what it was told")
def test_the_library_hears_of_it_before_it_loads() -> None:
    """OMP_DISPLAY_ENV makes the library of torch's threads print its settings as it loads."""
    program = (
        "import argparse, sys; from qwen_image_finetune.command import cli\n"
        "def verb(options):\n    assert 'torch' not in sys.modules\n    import torch\n"
        "sys.exit(cli.guarded(verb, argparse.Namespace()))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "true"},
    )  # fmt: skip
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
