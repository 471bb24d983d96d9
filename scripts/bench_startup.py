"""How long the quick answers of the command take: help, a refused configuration, a dry run.

    python scripts/bench_startup.py [--repeat 5]

Processor seconds of each process (user and system), the least of several: what other programs take does not count.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

REFUSED = "model: {pretrained_model_name_or_path: Qwen/Qwen-Image-Edit}\ntrain: {max_train_stps: 3}\n"
ACCEPTED = "model: {pretrained_model_name_or_path: Qwen/Qwen-Image-Edit}\n"


def processor_seconds(words: list[str]) -> float:
    """Processor time of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "qwen_image_finetune.cli", *words]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each, of which the least counts")
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        refused, accepted = Path(folder, "refused.yaml"), Path(folder, "accepted.yaml")
        refused.write_text(REFUSED)
        accepted.write_text(ACCEPTED)
        cases = {
            "--help": ["--help"],
            "refused configuration": ["train", str(refused)],
            "dry run": ["train", str(accepted), "--dry-run"],
        }
        for name, words in cases.items():
            print(f"{name:22} {min(processor_seconds(words) for _ in range(repeat)):.2f} s")


if __name__ == "__main__":
    main()
