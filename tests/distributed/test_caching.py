"""A cache filled by several processes is the cache of one, and nobody waits for a slow one while encoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import HERE

from qwen_image_finetune.config import load_config
from qwen_image_finetune.encoding.embeddings import encode_dataset

NAME = "QwenImageEdit"  # its texts see the references: three kinds of entries


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what is encoded is looked at."""
    return tmp_path / "cache"


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_cache_of_three_processes(configure: Callable[..., Any], torchrun: Callable[..., Any], tmp_path: Path) -> None:
    configure(NAME)
    config, cache = tmp_path / "config.yaml", tmp_path / "cache"
    encode_dataset(load_config(config, []))
    expected = entries(cache)
    assert len(expected) > 20
    shutil.rmtree(cache)
    done = torchrun(3, str(HERE / "slow_cache.py"), str(config), "1", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert entries(cache) == expected
    shares = [set((tmp_path / f"done-{rank}").read_text().split()) for rank in range(3)]
    assert sum(map(len, shares)) == len(expected) == len(set.union(*shares))
    assert all(shares)
