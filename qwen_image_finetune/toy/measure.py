"""How near drawn pictures come to the truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from qwen_image_finetune.toy.faces import BACKGROUND, classes
from qwen_image_finetune.toy.vae import psnr

Pictures = Sequence[Image.Image]


def mean_psnr(drawn: Pictures, truth: Pictures) -> float:
    """Mean over pictures of their PSNR in dB."""
    return float(np.mean([psnr(np.asarray(a), np.asarray(b)) for a, b in zip(drawn, truth, strict=True)]))


def foreground_iou(drawn: Image.Image, truth: Image.Image) -> float:
    """Intersection over union of everything that is not background in two segmentation masks of one size."""
    ours, theirs = (classes(np.asarray(mask.convert("RGB"))) != BACKGROUND for mask in (drawn, truth))
    return float((ours & theirs).sum() / max(1, (ours | theirs).sum()))
