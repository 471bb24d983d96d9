"""docs/gallery.md and its pictures: edits that the toy bases do not know, each learnt from twenty drawn pairs.

    python scripts/draw_gallery.py [--steps N] [--work FOLDER]

Takes a few minutes an edit on one core. Every number and picture on the page comes from the runs that this starts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from qwen_image_finetune.command.cli import main as qif
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.toy.faces import draw_face

ROOT = Path(__file__).resolve().parent.parent
PAIRS, HELD_OUT, SIZE, SHOWN = 20, 8, 256, 5
TILE, GAP = 112, 6  # pixels of the sheet


def sepia(picture: Image.Image) -> Image.Image:
    """Browns, with a pale frame."""
    toned = ImageOps.colorize(picture.convert("L"), (38, 22, 10), (255, 236, 196), mid=(150, 104, 62))
    return ImageOps.expand(toned.resize((SIZE - 32, SIZE - 32)), 16, (250, 244, 228))


def night(picture: Image.Image) -> Image.Image:
    """Dark and blue, with a moon at the top right."""
    values = np.asarray(picture, dtype=np.float32) * (0.30, 0.36, 0.62)
    dark = Image.fromarray(values.astype(np.uint8))
    ImageDraw.Draw(dark).ellipse((SIZE - 72, 20, SIZE - 24, 68), fill=(252, 244, 200))
    return dark


def glass(picture: Image.Image) -> Image.Image:
    """Flat strong colours between dark lines."""
    smooth = picture.filter(ImageFilter.ModeFilter(9))
    lines = smooth.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda level: 255 if level > 24 else 0)
    flat = ImageOps.posterize(smooth, 2).point(lambda level: min(255, int(level * 1.25)))
    flat.paste((20, 16, 30), mask=lines.filter(ImageFilter.MaxFilter(5)))
    return flat


@dataclass(frozen=True)
class Edit:
    """An instruction, its right answer, and who learns it."""

    title: str
    prompt: str
    base: str  # folder in toy/
    change: Callable[[Image.Image], Image.Image]


EDITS = {
    "sepia": Edit("An old print", "print the photo in sepia with a frame", "flux-kontext", sepia),
    "night": Edit("Night", "make it night, with a moon", "qwen-image-edit", night),
    "glass": Edit("Stained glass", "turn the picture into stained glass", "flux-kontext", glass),
}


def write_pairs(folder: Path, edit: Edit, seed: int, count: int) -> None:
    for part in ("control_images", "training_images"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        before = draw_face(np.random.default_rng([seed, index]), SIZE)[0]
        before.save(folder / f"control_images/{index:02}.png")
        edit.change(before).save(folder / f"training_images/{index:02}.png")
        (folder / f"training_images/{index:02}.txt").write_text(edit.prompt, encoding="utf-8")


def learn(name: str, edit: Edit, work: Path, steps: int) -> tuple[Path, float]:
    """One run and its evaluation; returns the run and the seconds that training took."""
    write_pairs(work / name / "pairs", edit, 11, PAIRS)
    write_pairs(work / name / "held_out", edit, 12, HELD_OUT)
    family = ROOT / f"configs/demo_{edit.base.replace('-', '_')}.yaml"
    settings: dict[str, Any] = yaml.safe_load(family.read_text(encoding="utf-8"))
    settings["model"]["pretrained_model_name_or_path"] = str(ROOT / "toy" / edit.base)
    # The frame and the moon have their places: windows cut from the pictures would move them.
    settings["data"]["init_args"] = {"dataset_path": str(work / name / "pairs"), "image_size": [64, 64]}
    settings["train"] |= {"max_train_steps": steps, "checkpointing_steps": steps}
    settings["cache"] = {"use_cache": True, "cache_dir": str(work / "cache")}
    settings["validation"] = {"enabled": False}
    settings["logging"] = {"output_dir": str(work), "tracker_project_name": name, "report_to": "none"}
    (work / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    began = time.monotonic()
    do("train", work / f"{name}.yaml")
    seconds = time.monotonic() - began
    run = sorted((work / name).glob("v*"), key=lambda path: int(path.name[1:]))[-1]
    do("evaluate", run, work / name / "held_out", "--steps", "8", "--guidance", "1")
    return run, seconds


def do(*words: str | Path) -> None:
    if qif([str(word) for word in words]) != 0:
        raise SystemExit(f"`qif {' '.join(map(str, words))}` failed")


def sheet(run: Path) -> Image.Image:
    """Rows from top to bottom: before, the base, the LoRA, what was wanted."""
    folder = run / "evaluation"
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    rows = [
        [folder / f"input/{place}.png" for place in range(SHOWN)],
        *([folder / one["pictures"][place]["file"] for place in range(SHOWN)]
          for one in found["candidates"] if one["name"] != "copy of the input"),
        [folder / f"truth/{place}.png" for place in range(SHOWN)],
    ]  # fmt: skip
    size = (SHOWN * (TILE + GAP) - GAP, len(rows) * (TILE + GAP) - GAP)
    drawn = Image.new("RGB", size, "white")
    for down, row in enumerate(rows):
        for across, file in enumerate(row):
            tile = Image.open(file).convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
            drawn.paste(tile, (across * (TILE + GAP), down * (TILE + GAP)))
    return drawn


def numbers(run: Path) -> dict[str, tuple[float, float]]:
    """PSNR and SSIM of what each candidate drew, over the held-out pairs."""
    found = json.loads((run / "evaluation/evaluation.json").read_text(encoding="utf-8"))["candidates"]
    return {one["name"]: (one["means"]["psnr"]["mean"], one["means"]["ssim"]["mean"]) for one in found}


def page(made: dict[str, tuple[Path, float]], steps: int) -> str:
    lines = [
        "# Gallery",
        "",
        f"Small models, real runs. Each edit was unknown to its base, and learnt from {PAIRS} drawn pairs in {steps:,}",
        f"steps on one processor core, without a GPU. The faces are of {HELD_OUT} pairs that nobody trained on. From",
        "top to bottom: the picture, what the base makes of the instruction, what the LoRA makes of it, and what was",
        "wanted.",
        "",
        "`python scripts/draw_gallery.py` makes this page: the pairs, the runs, the numbers. `make demo` shows one",
        "more edit, [segmentation](../README.md#two-commands).",
    ]
    for name, (run, seconds) in made.items():
        edit, found = EDITS[name], numbers(run)
        tuned = next(one for one in found if one not in ("base", "copy of the input"))
        lines += [
            "",
            f"## {edit.title}",
            "",
            f"![{edit.prompt}: rows of faces before, by the base, by the LoRA, and as wanted](gallery-{name}.png)",
            "",
            f"“{edit.prompt}”, on `toy/{edit.base}`, trained in {seconds:.0f} s.",
            "",
            "| | PSNR, dB | SSIM |",
            "|---|---|---|",
            f"| the picture as it is | {found['copy of the input'][0]:.1f} | {found['copy of the input'][1]:.2f} |",
            f"| the base | {found['base'][0]:.1f} | {found['base'][1]:.2f} |",
            f"| the LoRA | {found[tuned][0]:.1f} | {found[tuned][1]:.2f} |",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--work", type=Path, default=ROOT / "build/gallery")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    made = {name: learn(name, edit, options.work.resolve(), options.steps) for name, edit in EDITS.items()}
    for name, (run, _) in made.items():
        sheet(run).save(options.docs / f"gallery-{name}.png", optimize=True)
    write_atomic(options.docs / "gallery.md", page(made, options.steps))


if __name__ == "__main__":
    main()
