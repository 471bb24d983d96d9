"""Fills a cache while one process is slow from the start; says when each of them had encoded its share.

    torchrun ... slow_cache.py CONFIG SLOW_RANK FOLDER

The slow one waits until the others are done: would they wait for it anywhere before, nobody would ever end.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from qwen_image_finetune.config import load_config
from qwen_image_finetune.encoding import cache
from qwen_image_finetune.encoding.embeddings import encode_dataset


def main() -> None:
    config, slow, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    fill = cache.fill
    encoded: list[str] = []
    write = cache.Store.write

    def watched(*arguments: Any, **named: Any) -> None:
        while rank == slow and len(list(folder.glob("done-*"))) < size - 1:
            time.sleep(0.1)
        fill(*arguments, **named)
        (folder / f"done-{rank}").write_text("\n".join(encoded))

    def noted(store: cache.Store, key: str, tensors: Any) -> None:
        encoded.append(key)
        write(store, key, tensors)

    cache.fill = watched
    cache.Store.write = noted  # type: ignore[method-assign]
    encode_dataset(load_config(config, []))


if __name__ == "__main__":
    main()
