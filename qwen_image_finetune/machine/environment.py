"""What a run was made with: versions of packages and machine, kept beside its results."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "qwen-image-finetune", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes",
    "numpy", "pillow",
)  # fmt: skip


def environment(device: str, processes: int) -> dict[str, Any]:
    """Versions by package (those installed), interpreter, system, and what the run computes on."""
    return {
        "packages": dict(_installed()),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "processes": processes,
    }


@cache
def _installed() -> dict[str, str]:
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return packages
