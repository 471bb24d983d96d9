"""Draw the two example datasets: data/face_seg to train on and data/face_seg_held_out to measure with.

    python scripts/draw_face_seg.py [FOLDER]

FOLDER is the parent of both, `data` beside this script's folder if left out. The same files come out every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from qwen_image_finetune.toy.faces import draw_face

SIZE = 256  # pixels
PICTURES = 20  # in each dataset
DATASETS = {"face_seg": 0, "face_seg_held_out": 1}  # name to seed
PROMPTS = (
    "draw the segmentation mask of this face",
    "segment this face into background, skin, hair, eyes, mouth and hat",
    "turn the portrait into a segmentation map, one flat color for each part",
)


def draw_dataset(folder: Path, seed: int) -> None:
    """Write `folder`: control_images/*.jpg, and training_images/*.png with a prompt beside each."""
    controls, targets = folder / "control_images", folder / "training_images"
    for place in (controls, targets):
        place.mkdir(parents=True, exist_ok=True)
    for index in range(PICTURES):
        face, mask = draw_face(np.random.default_rng([seed, index]), SIZE)
        name = f"face_{index:02d}"
        face.save(controls / f"{name}.jpg", quality=92)
        mask.save(targets / f"{name}.png", optimize=True)
        (targets / f"{name}.txt").write_text(PROMPTS[index % len(PROMPTS)] + "\n", encoding="utf-8")


def main() -> None:
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "data"
    for name, seed in DATASETS.items():
        draw_dataset(parent / name, seed)
        print(f"{parent / name}: {PICTURES} pairs of {SIZE} x {SIZE} pixels")


if __name__ == "__main__":
    main()
