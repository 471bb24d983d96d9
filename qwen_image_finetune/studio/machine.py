"""What this machine has, and how much of it is in use."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from typing import Any

import psutil

FRESH = 2.0  # seconds for which what was read is told again
_QUERY = "name,memory.used,memory.total,utilization.gpu"
_reading = threading.Lock()
_last: list[tuple[float, dict[str, Any]]] = []  # when it was read, and what


def machine() -> dict[str, Any]:
    """Memory in GiB, use in percent; the cards as the driver tells them."""
    with _reading:
        if not _last or time.monotonic() - _last[0][0] > FRESH:
            memory = psutil.virtual_memory()
            found = {
                "cards": cards(),
                "processor": psutil.cpu_percent(),
                "memory": round((memory.total - memory.available) / 2**30, 1),
                "of_memory": round(memory.total / 2**30, 1),
            }
            _last[:] = [(time.monotonic(), found)]
        return _last[0][1]


def cards() -> list[dict[str, Any]]:
    """Name, memory in GiB and use in percent of each card; none where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except subprocess.TimeoutExpired:
        return []
    return [card for line in listed.splitlines() if (card := _card(line)) is not None]


def _card(line: str) -> dict[str, Any] | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4 or not all(part.isdigit() for part in parts[1:]):
        return None
    name, used, total, busy = parts
    return {"name": name, "memory": round(int(used) / 1024, 1), "of_memory": round(int(total) / 1024, 1),
            "busy": int(busy)}  # fmt: skip
