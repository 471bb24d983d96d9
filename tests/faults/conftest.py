"""The laboratory, one for each worker: small checkpoints, pairs, and the server that forks runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import lab as laboratory  # noqa: E402


@pytest.fixture(scope="session")
def lab(
    tmp_path_factory: pytest.TempPathFactory, build_once: Callable[[str, Callable[[Path], object]], Path]
) -> laboratory.Lab:
    checkpoints = {
        family: build_once(
            f"small-{family}", lambda folder, family=family: laboratory.write_small_checkpoint(family, folder)
        )
        for family in laboratory.FAMILIES
    }
    pairs = build_once("small-pairs", laboratory.write_pairs)
    made = laboratory.Lab(tmp_path_factory.mktemp("lab"), checkpoints, pairs)
    # The server inherits the environment, not sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    os.environ["QIF_LAB_CHECKPOINTS"] = os.pathsep.join(f"{name}={folder}" for name, folder in checkpoints.items())
    made.context.set_forkserver_preload(["warm"])
    return made
