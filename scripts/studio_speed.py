"""How fast the studio's pages are with many pairs and runs: the first time after it has started, and later.

python scripts/studio_speed.py [--pairs 10000] [--runs 200]

Pictures are of 512 x 384 pixels, a few files that stand in for all (hard links); each run has 1,000 steps, ten
checkpoints and samples. The server is a process of its own; times are those of whole answers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from qwen_image_finetune.config import Config

VARIANTS = 20  # different pictures


def picture(path: Path, seed: int) -> None:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((512, 384), Image.Resampling.BICUBIC).save(path, quality=90)


def write_pairs(folder: Path, count: int) -> None:
    """A data set of so many pairs."""
    for side in ("control_images", "training_images"):
        (folder / side).mkdir(parents=True)
        for number in range(count):
            file = folder / side / f"{number:06}.jpg"
            first = folder / side / f"{number % VARIANTS:06}.jpg"
            picture(file, number) if number < VARIANTS else os.link(first, file)
    for number in range(count):
        (folder / "training_images" / f"{number:06}.txt").write_text(f"edit number {number}\n")


def write_runs(folder: Path, count: int, steps: int = 1000) -> None:
    """So many runs that have ended."""
    text = Config.model_validate({"model": {"pretrained_model_name_or_path": "Qwen/Qwen-Image-Edit"}}).to_yaml()
    values = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, "step_seconds": 0.7, "memory_gib": 18.4}
    metrics = "".join(json.dumps({"step": step, **values}) + "\n" for step in range(1, steps + 1))
    parts = [{"name": name, "left": place * 256, "width": 256} for place, name in enumerate(("reference", "drawn"))]
    for number in range(count):
        run = folder / f"project_{number % 10}" / f"v{number // 10}"
        (run / "samples/step-1000").mkdir(parents=True)
        (run / "config.yaml").write_text(text)
        (run / "metrics.jsonl").write_text(metrics)
        (run / "run.json").write_text(json.dumps({"state": "finished", "step": steps}))
        (run / "run.lock").touch()
        picture(run / "samples/step-1000/0.png", number)
        (run / "samples/step-1000/layout.json").write_text(json.dumps([{"key": "a", "prompt": "b", "parts": parts}]))
        for checkpoint in range(100, steps + 1, 100):
            (run / f"checkpoint-0-{checkpoint}").mkdir()


def seconds(address: str) -> tuple[float, int]:
    """(seconds until the whole answer is there, its bytes)"""
    began = time.perf_counter()
    with urllib.request.urlopen(address) as answer:
        size = len(answer.read())
    return time.perf_counter() - began, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pictures", options.pairs)
        write_runs(folder / "output", options.runs)
        command = [sys.executable, "-m", "qwen_image_finetune.cli", "studio", name, "--port", "0"]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            found = re.search(r"http://[\d.:]+", server.stdout.readline())
            assert found
            opened = time.perf_counter() - began
            print(f"{options.pairs} pairs, {options.runs} runs; the link is printed after {opened:.2f} s")
            for path in ("/", "/runs", "/data?set=pictures", "/data?set=pictures&page=100",
                         "/data?set=pictures&search=99", "/watch?run=output/project_0/v0",
                         "/watch/live?run=output/project_0/v0&offset=0",
                         "/thumbnail?side=160&picture=pictures/training_images/000003.jpg"):  # fmt: skip
                first, size = seconds(found[0] + path)
                again, _ = seconds(found[0] + path)
                print(f"  {first:6.3f} s first, {again:6.3f} s later, {size / 1024:7.1f} KiB  {path}")
            server.terminate()


if __name__ == "__main__":
    main()
