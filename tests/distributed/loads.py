"""Loads a transformer, alone or sharing it, and says how much of this process's own memory that took.

    torchrun ... loads.py FOLDER RESULTS

Counted are anonymous pages: those of files that are mapped belong to the page cache, once a machine, and go when others
need the room. RESULTS.RANK.json: for each way, bytes held in the end, and most bytes of own memory on the way.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import local_bytes

from qwen_image_finetune import loading
from qwen_image_finetune.families import get_family
from qwen_image_finetune.levers import parallel

FAMILY = get_family("FluxKontext")
CPU = torch.device("cpu")


def own_memory() -> int:
    """Bytes of anonymous pages of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def measured(load: Callable[[], Any], kept: list[Any]) -> dict[str, int]:
    end, start = threading.Event(), own_memory()
    peak = start

    def watch() -> None:
        nonlocal peak
        while not end.wait(0.002):
            peak = max(peak, own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        kept.append(load())
    finally:
        end.set()
        watching.join()
    return {"held": local_bytes(kept[-1]), "peak": max(peak, own_memory()) - start}


def shared(folder: Path) -> Any:
    model = loading.empty_transformer(FAMILY, folder, torch.float32)
    parallel.shard(model, parallel.Sharding(), CPU)
    parallel.fill(model, folder / "transformer", torch.float32, CPU)
    return model


def whole(folder: Path) -> Any:
    return loading.load_transformer(FAMILY, folder, torch.float32)


def elsewhere(folder: Path) -> Any:
    """Onto "meta", which stands for a card: it keeps nothing here."""
    return loading.load_transformer(FAMILY, folder, torch.float32, device="meta")


def swapped(folder: Path) -> Any:
    """The same, but for a third of the blocks."""
    return loading.load_transformer(FAMILY, folder, torch.float32, device="meta", blocks_to_swap=4)


def main() -> None:
    folder, results = Path(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    ways = {"elsewhere": elsewhere, "swapped": swapped, "shared": shared, "whole": whole}
    if os.environ["WORLD_SIZE"] == "1":
        ways.pop("shared")
    kept: list[Any] = []  # else the memory of one would serve the next
    found = {name: measured(lambda way=way: way(folder), kept) for name, way in ways.items()}
    results.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
