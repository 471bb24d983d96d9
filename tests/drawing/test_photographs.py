"""Real photographs of different sizes and ratios, through caching, training and prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps

from qwen_image_finetune.config import Config
from qwen_image_finetune.data.images import open_upright
from qwen_image_finetune.encoding.pairs import open_dataset
from qwen_image_finetune.families import get_family
from qwen_image_finetune.trainer import Trainer

Configure = Callable[..., Config]
RESOLUTION = 96
# Parts (left, top, right, bottom) of photographs that scikit-image carries; ratios from 1 : 2 to 3 : 1.
CUTS = {
    "astronaut": (0, 0, 512, 512),
    "astronaut_tall": (120, 0, 376, 512),
    "chelsea": (0, 0, 451, 300),
    "chelsea_wide": (0, 100, 450, 250),
    "coffee": (0, 0, 600, 400),
    "coffee_tall": (100, 0, 400, 400),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs: a photograph, and the same in grey. One reference is larger than its target, one is turned by EXIF."""
    folder = tmp_path_factory.mktemp("photographs")
    for part in ("control_images", "training_images"):
        (folder / part).mkdir()
    for name, box in CUTS.items():
        picture = Image.fromarray(getattr(skimage.data, name.partition("_")[0])()).crop(box)
        grey = ImageOps.grayscale(picture)  # one channel: the reader makes RGB of it
        if name == "coffee":
            grey = grey.resize((grey.width // 2, grey.height // 2))
        grey.save(folder / "training_images" / f"{name}.png")
        (folder / "training_images" / f"{name}.txt").write_text("turn it into a black and white photograph\n")
        if name == "chelsea":
            exif = Image.Exif()
            exif[0x0112] = 6  # "turn clockwise to see it upright"
            picture.transpose(Image.Transpose.ROTATE_90).save(folder / "control_images" / f"{name}.jpg", exif=exif)
        else:
            picture.save(folder / "control_images" / f"{name}.jpg", quality=92)
    return folder


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_sizes_follow_the_photographs(name: str, photographs: Path, configure: Configure) -> None:
    config = configure(name, f"data.init_args.dataset_path={photographs}", f"data.init_args.resolution={RESOLUTION}")
    dataset = open_dataset(config, get_family(name))
    assert len(dataset) == len(CUTS)
    for index, row in enumerate(dataset.rows):
        left, top, right, bottom = CUTS[row.key]
        ratio = (right - left) / (bottom - top)
        target, reference = dataset.geometry(index)
        assert target == reference
        ideal = (RESOLUTION * math.sqrt(ratio), RESOLUTION / math.sqrt(ratio))
        assert all(abs(side - wanted) <= 32 for side, wanted in zip(target, ideal, strict=True))  # multiples of 16, 32
        example = dataset.load(index)
        upright = np.asarray(ImageOps.grayscale(example.references[0]).resize((64, 64))).astype(float)
        wanted = np.asarray(ImageOps.grayscale(example.target).resize((64, 64))).astype(float)
        assert np.abs(upright - wanted).mean() < 8, f"{row.key}: source and target do not lie on top of each other"


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_cached_trained_and_drawn(name: str, photographs: Path, configure: Configure) -> None:
    config = configure(
        name, f"data.init_args.dataset_path={photographs}", f"data.init_args.resolution={RESOLUTION}",
        "data.batch_size=2", "train.max_train_steps=5",
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.cache()
    run = trainer.fit()
    assert run is not None
    trainer.load_lora(next(run.glob("checkpoint-*")))
    for file in sorted((photographs / "control_images").iterdir()):
        photograph = Image.open(file)
        (drawn,) = trainer.predict(photograph, "turn it into a black and white photograph", num_inference_steps=2)
        width, height = open_upright(file).size
        assert drawn.mode == "RGB"
        assert drawn.size == get_family(name).size(width, height, RESOLUTION**2)
        assert np.asarray(drawn).std() > 1, "an even picture: something was not finite"
