"""`qif demo`: for both families, a LoRA from twenty pairs, and faces nobody trained on before and after it.

Caching, training, drawing, measuring and reporting go through the commands a user types; the demonstration types them,
and ends with one page to open.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from qwen_image_finetune.command.materials import lay_out
from qwen_image_finetune.disk.versions import LORA_WEIGHTS, checkpoint_folders, version_folders
from qwen_image_finetune.judging.demo_page import Shown, scores, write_page
from qwen_image_finetune.machine import console

FAMILIES = {"flux_kontext": "FLUX Kontext", "qwen_image_edit": "Qwen-Image-Edit"}
FACE = "data/face_seg_held_out/control_images/face_00.jpg"
PROMPT = "draw the segmentation mask of this face"
SAMPLING = ("--steps", "8", "--guidance", "1")
OUTPUT = Path("demo/output")  # as the configurations say


def demo(folder: Path) -> Path:
    """Run all of it in a folder, which gets the toy bases and data sets if it lacks them; returns the page.

    Raises:
        DemoError: there are no toy bases to put there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if brought := lay_out(folder):
        console.say(f"{folder}: two toy bases, two data sets and two configurations ({len(brought)} new)")
    shown = [demonstrate(folder, name) for name in FAMILIES]
    page = write_page(folder / OUTPUT / "demo.html", shown)
    console.say(f"\nDone in {console.duration(time.monotonic() - began)}. Foreground IoU is how much of face, hair and "
                "hat a mask has in common with the true one, from 0 to 1.")  # fmt: skip
    for one in shown:
        before, after = scores(one.version)
        console.say(f"\n{one.title}: foreground IoU {before:.2f} with the base alone, {after:.2f} with the LoRA")
        console.say(f"  version folder      {one.version}")
        console.say(f"  TensorBoard events  {next(one.version.glob('events.out.tfevents.*'))}")
        console.say(f"  LoRA file           {one.lora}, trained in {console.duration(one.training_seconds)}")
        console.say(f"  picture             {one.version / 'prediction.png'}")
        console.say(f"  its report          {one.version / 'report.html'}")
    console.say(f"\nCurves of every version side by side:       tensorboard --logdir {folder / OUTPUT}")
    console.say(f"Pictures, runs and samples in the browser:  qif studio {folder}")
    console.say(f"\nOpen this page first:  {page.resolve()}")
    return page


def demonstrate(folder: Path, name: str) -> Shown:
    """Cache, train, draw, measure and report one family."""
    config = f"configs/demo_{name}.yaml"
    qif(folder, "cache", config)
    began = time.monotonic()
    qif(folder, "train", config)
    seconds = time.monotonic() - began
    version = version_folders(folder / OUTPUT / name)[-1]
    lora = checkpoint_folders(version)[-1] / LORA_WEIGHTS
    run = version.relative_to(folder)
    qif(folder, "predict", config, "--lora", lora.relative_to(folder), "--image", FACE, "--prompt", PROMPT, *SAMPLING,
        "--output", run / "prediction.png")  # fmt: skip
    qif(folder, "evaluate", run, *SAMPLING)
    qif(folder, "report", run)
    return Shown(FAMILIES[name], version, lora, seconds)


def qif(folder: Path, *words: str | Path) -> None:
    """Run a command of the package in the folder, shown as the user would type it there."""
    console.say(f"\n$ qif {shlex.join(map(str, words))}")
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-m", "qwen_image_finetune.cli", *map(str, words)],
        cwd=folder, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
