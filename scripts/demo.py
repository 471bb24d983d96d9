"""See it learn: for both families, a LoRA from twenty pairs, and faces nobody trained on before and after it.

`make demo` runs it, on any machine. Caching, training and drawing go through the commands a user types; this script
types them, then draws the held-out faces with and without the LoRA and counts how much of each mask is right.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from draw_many import add_lora, draw, open_base
from PIL import Image

from qwen_image_finetune.config import load_config
from qwen_image_finetune.disk.versions import checkpoint_folders
from qwen_image_finetune.drawing.predict import Predictor
from qwen_image_finetune.toy.measure import foreground_iou

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"flux_kontext": "FluxKontext", "qwen_image_edit": "QwenImageEdit"}
HELD_OUT = ROOT / "data/face_seg_held_out"
PROMPT = "draw the segmentation mask of this face"
SAMPLING_STEPS = 8
ZOOM = 2  # of the contact sheets


@dataclass(frozen=True)
class Result:
    """What one family's run left behind."""

    family: str
    version: Path
    lora: Path
    picture: Path
    sheet: Path
    training_seconds: float
    before: float  # mean foreground IoU of the masks drawn by the base alone
    after: float  # with the LoRA


def qif(*words: str | Path) -> None:
    """Run a command of the package, shown as the user would type it."""
    print(f"\n$ qif {shlex.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "qwen_image_finetune.cli", *map(str, words)], cwd=ROOT, check=True)


def newest_version(project: Path) -> Path:
    versions = [path for path in project.iterdir() if path.name[1:].isdigit()]
    return max(versions, key=lambda path: int(path.name[1:]))


def demonstrate(name: str) -> Result:
    """Cache, train and draw one family."""
    config = Path(f"configs/demo_{name}.yaml")
    qif("cache", config)
    began = time.monotonic()
    qif("train", config)
    seconds = time.monotonic() - began
    version = newest_version(ROOT / "demo/output" / name)
    lora, picture = checkpoint_folders(version)[-1] / "pytorch_lora_weights.safetensors", version / "prediction.png"
    face = sorted((HELD_OUT / "control_images").glob("*.jpg"))[0].relative_to(ROOT)
    qif("predict", config, "--lora", lora.relative_to(ROOT), "--image", face, "--prompt", PROMPT, "--steps",
        str(SAMPLING_STEPS), "--guidance", "1", "--output", picture.relative_to(ROOT))  # fmt: skip

    predictor = open_base(FAMILIES[name], ROOT / load_config(ROOT / config).model.pretrained_model_name_or_path, 64)
    faces, masks = held_out(predictor)
    before = draw(predictor, [(face, PROMPT) for face in faces], SAMPLING_STEPS)
    add_lora(predictor, lora)
    after = draw(predictor, [(face, PROMPT) for face in faces], SAMPLING_STEPS)
    sheet = version / "held_out.png"
    contact_sheet([faces, before, after, masks]).save(sheet)
    scores = [np.mean([foreground_iou(*pair) for pair in zip(row, masks, strict=True)]) for row in (before, after)]
    return Result(FAMILIES[name], version, lora, picture, sheet, seconds, float(scores[0]), float(scores[1]))


def held_out(predictor: Predictor) -> tuple[list[Image.Image], list[Image.Image]]:
    """Faces nobody trained on and their masks, at the size the model sees."""
    faces = [Image.open(file).convert("RGB") for file in sorted((HELD_OUT / "control_images").glob("*.jpg"))]
    masks = [Image.open(file).convert("RGB") for file in sorted((HELD_OUT / "training_images").glob("*.png"))]
    size = predictor.size(faces[0])
    return (
        [face.resize(size, Image.Resampling.LANCZOS) for face in faces],
        [mask.resize(size, Image.Resampling.NEAREST) for mask in masks],
    )


def contact_sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures of one size, enlarged without smoothing."""
    width, height = rows[0][0].width * ZOOM, rows[0][0].height * ZOOM
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left * width, top * height))
    return sheet


def main() -> None:
    began = time.monotonic()
    results = [demonstrate(name) for name in FAMILIES]
    print(f"\nDone in {time.monotonic() - began:.0f} s. Foreground IoU: how much of face, hair and hat a mask "
          "has in common with the true one, from 0 to 1.")  # fmt: skip
    for result in results:
        print(f"\n{result.family}")
        print(f"  version folder      {result.version.relative_to(ROOT)}")
        print(f"  TensorBoard events  {next(result.version.glob('events.out.tfevents.*')).relative_to(ROOT)}")
        print(f"  LoRA file           {result.lora.relative_to(ROOT)}, trained in {result.training_seconds:.0f} s")
        print(f"  picture             {result.picture.relative_to(ROOT)}")
        print(f"  held-out faces      {result.sheet.relative_to(ROOT)}, rows: reference, base, LoRA, truth")
        print(f"  foreground IoU      {result.before:.2f} with the base alone, {result.after:.2f} with the LoRA")
    print("\nCurves of every version side by side:  .venv/bin/tensorboard --logdir demo/output")
    print("Pictures, runs and samples in the browser:  .venv/bin/qif studio .")


if __name__ == "__main__":
    main()
