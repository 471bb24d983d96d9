"""`qif demo`: for both families, a LoRA from twenty pairs, and faces nobody trained on before and after it.

Caching, training, drawing, measuring and reporting go through the commands a user types; the demonstration types them,
and ends with one page to open.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path

from qwen_image_finetune.command.materials import DemoError, put_there
from qwen_image_finetune.disk.versions import LORA_WEIGHTS, checkpoint_folders, version_folders
from qwen_image_finetune.judging.demo_page import Shown, scores, write_page
from qwen_image_finetune.machine import console

FAMILIES = {"flux_kontext": "FLUX Kontext", "qwen_image_edit": "Qwen-Image-Edit"}
FACE = "data/face_seg_held_out/control_images/face_00.jpg"
PROMPT = "draw the segmentation mask of this face"
SAMPLING = ("--steps", "8", "--guidance", "1")
Run = Callable[[Sequence[str]], int]
OUTPUT = Path("demo/output")  # as the configurations say


def demo(folder: Path, run: Run) -> Path:
    """Do all of it in a folder, which gets the toy bases and data sets if it lacks them; returns the page.

    Args:
        run: takes the words after `qif`, returns the exit code.

    Raises:
        DemoError: there are no toy bases to put there, or a command failed.
    """
    began = time.monotonic()
    put_there(folder)
    shown = [demonstrate(folder, name, run) for name in FAMILIES]
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


def demonstrate(folder: Path, name: str, run: Run) -> Shown:
    """Cache, train, draw, measure and report one family."""
    config = f"configs/demo_{name}.yaml"
    typed(folder, run, "cache", config)
    began = time.monotonic()
    typed(folder, run, "train", config)
    seconds = time.monotonic() - began
    version = version_folders(folder / OUTPUT / name)[-1]
    lora = checkpoint_folders(version)[-1] / LORA_WEIGHTS
    home = version.relative_to(folder)
    typed(folder, run, "predict", config, "--lora", lora.relative_to(folder), "--image", FACE, "--prompt", PROMPT,
          *SAMPLING, "--output", home / "prediction.png")  # fmt: skip
    typed(folder, run, "evaluate", home, *SAMPLING)
    typed(folder, run, "report", home)
    return Shown(FAMILIES[name], version, lora, seconds)


def typed(folder: Path, run: Run, *words: str | Path) -> None:
    """Run a command of the package in the folder, shown as the user would type it there.

    In this process: importing torch for each of ten commands would take a fifth of the time.

    Raises:
        DemoError: it failed, and has said why.
    """
    command = [str(word) for word in words]
    console.say(f"\n$ qif {shlex.join(command)}")
    with chdir(folder):
        code = run(command)
    if code != 0:
        raise DemoError(f"`qif {shlex.join(command)}` ended with {code}: what it said is above")
