"""How much host memory a process may still take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can take before the system ends it; None where the system does not say.

    The least of what Linux counts as available (proc(5)) and of what the control groups around the process, version 2,
    still allow (Linux, Documentation/admin-guide/cgroup-v2.rst).

    Args:
        root: where proc and sys are.
    """
    said = root / "proc/meminfo"
    found = re.search(r"^MemAvailable:\s*(\d+) kB", said.read_text(), re.MULTILINE) if said.is_file() else None
    return None if found is None else min([1024 * int(found[1]), *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes below the limit of each group; files that were read count as used, and make way."""
    all_groups = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.MULTILINE)
    group = all_groups / (own[1] if own else "")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(all_groups) or not (folder / "memory.max").is_file():
            continue
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            pages = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            used = int((folder / "memory.current").read_text()) - (int(pages[1]) if pages else 0)
            yield max(0, int(limit) - used)
