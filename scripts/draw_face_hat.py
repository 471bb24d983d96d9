"""Draw data/face_hat, the example dataset with two references a pair: a face, a hat, and the face with that hat.

    python scripts/draw_face_hat.py [FOLDER]

FOLDER is where face_hat goes, `data` beside this script's folder if left out. The same files come out every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from qwen_image_finetune.toy.faces import Wish, draw_face
from qwen_image_finetune.toy.hats import HATS, chosen_hat, draw_hat

SIZE = 256  # pixels
PICTURES = 12
QUALITY = 88  # of the JPEG files
FACES, CLOTHS = 2, 3  # seeds
BACKGROUND = (238, 238, 234)  # of the hats
PROMPTS = (
    "put the hat of the second picture on the face of the first",
    "the face of picture 1 wears the hat of picture 2",
    "let the person in the first picture wear the hat from the second picture",
)


def draw_dataset(folder: Path) -> None:
    """Write `folder`: control_images/*.jpg, two of each pair, and training_images/*.jpg with a prompt beside each."""
    controls, targets = folder / "control_images", folder / "training_images"
    for place in (controls, targets):
        place.mkdir(parents=True, exist_ok=True)
    for index in range(PICTURES):
        hat = chosen_hat(index % len(HATS), [CLOTHS, index])
        before, after = (
            draw_face(np.random.default_rng([FACES, index]), SIZE, Wish(hat=worn))[0] for worn in ("none", hat)
        )
        name = f"face_{index:02d}"
        before.save(controls / f"{name}.jpg", quality=QUALITY)
        draw_hat(hat, SIZE, BACKGROUND).save(controls / f"{name}_control_1.jpg", quality=QUALITY)
        after.save(targets / f"{name}.jpg", quality=QUALITY)
        (targets / f"{name}.txt").write_text(PROMPTS[index % len(PROMPTS)] + "\n", encoding="utf-8")


def main() -> None:
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "data"
    draw_dataset(parent / "face_hat")
    print(f"{parent / 'face_hat'}: {PICTURES} pairs of {SIZE} x {SIZE} pixels, two references each")


if __name__ == "__main__":
    main()
