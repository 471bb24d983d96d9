"""Time and memory of listing a large data set: python scripts/bench_index.py --pairs 100000 [--check]

Writes that many pairs into a temporary folder (links to few tiny files, so that the disk holds little), lists them as a
run does when it starts, and puts an epoch of batches in order.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from qwen_image_finetune.config import DatasetArguments
from qwen_image_finetune.data.batches import Batches
from qwen_image_finetune.data.dataset import ImageDataset

LINKS = 10_000  # per file; file systems allow 65,000 or so


def write_pairs(folder: Path, pairs: int) -> None:
    """`pairs` references, targets and captions."""
    for name, ending in (("control_images", "png"), ("training_images", "png"), ("training_images", "txt")):
        (folder / name).mkdir(exist_ok=True)
        for number in range(pairs):
            path = folder / name / f"image_{number:07d}.{ending}"
            if number % LINKS == 0:
                first = path
                if ending == "png":
                    Image.new("RGB", (8, 8), "white" if name == "control_images" else "black").save(first)
                else:
                    first.write_text("a prompt")
            else:
                os.link(first, path)


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the seconds and how far the process's peak of memory rose."""
    peak, begin = _peak(), time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begin:.2f} s, peak memory +{_peak() - peak:.0f} MiB")


def _peak() -> float:
    """Largest resident memory of this process so far, in MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--check", action="store_true", help="read every header and caption as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_pairs(Path(name), options.pairs)
        with measured(f"list {options.pairs} pairs"):
            data = ImageDataset(DatasetArguments(dataset_path=name), lambda width, height, area: (32, 32), 16, 1)
        assert len(data) == options.pairs
        if options.check:
            with measured("check headers and captions"):
                assert data.check() == []
        with measured("order one epoch, find step 1,000,000"):
            batches = Batches(
                [(0,)] * len(data),
                batch_size=4,
                micro_batches_per_step=2,
                seed=0,
                shuffle=True,
                caption_dropout_rate=0.1,
                reference_dropout_rate=0.1,
            )
            batches.at(0)
            batches.at(1_000_000)


if __name__ == "__main__":
    main()
