"""Free host memory, read from a made-up system."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_image_finetune.fitting.host_memory import free_host_memory

MIB = 2**20


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system with 1000 MiB available, and a process in a group that is in a group."""
    put(tmp_path, "proc/meminfo", f"MemTotal: 9 kB\nMemAvailable:   {1000 * 1024} kB\n")
    put(tmp_path, "proc/self/cgroup", "4:memory:/old\n0::/outer/inner\n")
    return tmp_path


def limit(root: Path, group: str, limit: str, used: int = 0, files: int = 0) -> None:
    put(root, f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
    put(root, f"sys/fs/cgroup/{group}/memory.current", f"{used}\n")
    put(root, f"sys/fs/cgroup/{group}/memory.stat", f"anon 1\ninactive_file {files}\n")


def test_the_least_that_is_left_counts(root: Path) -> None:
    assert free_host_memory(root) == 1000 * MIB
    limit(root, "outer/inner", "max")
    assert free_host_memory(root) == 1000 * MIB
    limit(root, "outer", str(800 * MIB), used=300 * MIB, files=100 * MIB)
    assert free_host_memory(root) == 600 * MIB
    limit(root, "outer/inner", str(50 * MIB), used=60 * MIB)
    assert free_host_memory(root) == 0


def test_a_container_that_sees_its_group_as_the_root(root: Path) -> None:
    limit(root, ".", str(700 * MIB), used=300 * MIB)
    assert free_host_memory(root) == 400 * MIB


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) is None
