"""How close an edit is to its truth, and what it did to the rest of the picture.

Pictures are float arrays (H, W, 3), sRGB in [0, 1], of one size. The measures themselves are scikit-image's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.float64]  # (H, W, 3)
Mask = NDArray[np.bool_]  # (H, W)

PSNR_LIMIT = 100.0  # dB, said of equal pictures: infinity has no mean
VISIBLE = 5.0  # Delta E 2000 from which a pixel counts as edited; about 2 is the least that an eye sees
MARGIN = 2  # pixels around the edited region that count to neither side: resampling blurs its border
LEAST_SHARE = 0.01  # of the picture that a region must have to be measured
LEAST_CONTRAST = 0.01  # standard deviation of the grey values below which a picture has nothing to correlate


@dataclass(frozen=True)
class Metric:
    """One number of a picture."""

    unit: str
    better: str  # "higher", "lower", or "" where it is compared with the truth's own
    words: str


METRICS = {
    "psnr": Metric("dB", "higher", "peak signal-to-noise ratio against the truth"),
    "ssim": Metric("", "higher", "structural similarity to the truth (Wang et al. 2004)"),
    "lpips": Metric("", "lower", "learned perceptual distance to the truth (Zhang et al. 2018, AlexNet)"),
    "colour_drift": Metric("Delta E", "lower", "mean CIEDE2000 difference where the truth leaves the input as it is"),
    "displacement": Metric("pixels", "lower", "length of the shift against the truth, by phase correlation"),
    "zoom": Metric("%", "lower", "size of the enlargement or reduction against the truth"),
    "change_inside": Metric("of 255", "", "mean difference from the input in the edited region"),
    "change_outside": Metric("of 255", "lower", "mean difference from the input outside of it"),
}


def pixels(picture: Image) -> Pixels:
    """A picture as (H, W, 3) float64, sRGB in [0, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255


def edited_region(source: Pixels, truth: Pixels) -> Mask:
    """Where the truth visibly differs from the input, (H, W)."""
    return colour_difference(source, truth) > VISIBLE


def measure(drawn: Pixels, truth: Pixels, source: Pixels | None, edited: Mask | None = None) -> dict[str, float | None]:
    """All measures of one picture but LPIPS; None where one cannot be taken.

    Args:
        source: the input that was edited, at the size of the truth; None for a picture from a prompt alone.
        edited: the edited region; by default where truth and input differ.
    """
    shift, zoom = displacement(drawn, truth)
    found: dict[str, float | None] = {
        "psnr": psnr(drawn, truth), "ssim": ssim(drawn, truth), "displacement": shift, "zoom": zoom,
        "colour_drift": None, "change_inside": None, "change_outside": None,
    }  # fmt: skip
    if source is not None:
        inside = edited_region(source, truth) if edited is None else edited
        outside = ~_grown(inside)
        found["colour_drift"] = _mean(colour_difference(drawn, truth), outside)
        change = np.abs(drawn - source).mean(axis=2) * 255
        found["change_inside"], found["change_outside"] = _mean(change, inside), _mean(change, outside)
    return found


def psnr(drawn: Pixels, truth: Pixels) -> float:
    """Peak signal-to-noise ratio in dB; PSNR_LIMIT for equal pictures."""
    from skimage.metrics import mean_squared_error, peak_signal_noise_ratio

    if mean_squared_error(truth, drawn) == 0:
        return PSNR_LIMIT
    return min(float(peak_signal_noise_ratio(truth, drawn, data_range=1.0)), PSNR_LIMIT)


def ssim(drawn: Pixels, truth: Pixels) -> float | None:
    """With the Gaussian window of the paper, 11 pixels wide; None for pictures smaller than that."""
    from skimage.metrics import structural_similarity

    if min(drawn.shape[:2]) < 11:
        return None
    return float(
        structural_similarity(
            truth, drawn, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def colour_difference(first: Pixels, second: Pixels) -> NDArray[np.float64]:
    """CIEDE2000 of every pixel, (H, W)."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    return np.asarray(deltaE_ciede2000(rgb2lab(first), rgb2lab(second)), dtype=np.float64)


def displacement(drawn: Pixels, truth: Pixels) -> tuple[float | None, float | None]:
    """(length of the shift in pixels, size of the change of scale in percent) of a picture against its truth.

    The scale is that which best explains the shifts of the four quarters. None where one picture has no contrast.
    """
    grey, wanted = (picture.mean(axis=2) for picture in (drawn, truth))
    whole = _shift(grey, wanted)
    if whole is None:
        return None, None
    rows, columns = grey.shape[0] // 2, grey.shape[1] // 2
    along = across = 0.0
    for top in (0, grey.shape[0] - rows):
        for left in (0, grey.shape[1] - columns):
            part = np.s_[top : top + rows, left : left + columns]
            moved = _shift(grey[part], wanted[part])
            if moved is None:
                return math.hypot(*whole), None
            # Offset of the quarter's centre from the picture's: what lies there moves by (scale - 1) times it.
            offset = (rows / 2 if top else -rows / 2, columns / 2 if left else -columns / 2)
            along += moved[0] * offset[0] + moved[1] * offset[1]
            across += offset[0] ** 2 + offset[1] ** 2
    return math.hypot(*whole), abs(100 * along / across)


def _shift(grey: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[float, float] | None:
    """How far (down, right) `grey` lies from `wanted`, to a twentieth of a pixel; None without contrast."""
    from skimage.filters import window
    from skimage.registration import phase_cross_correlation

    if min(grey.std(), wanted.std()) < LEAST_CONTRAST:
        return None
    fade = window("hann", grey.shape)  # the edges of a picture would correlate with themselves, unmoved
    shift, _, _ = phase_cross_correlation(
        (wanted - wanted.mean()) * fade, (grey - grey.mean()) * fade, upsample_factor=20, normalization=None
    )
    return -float(shift[0]), -float(shift[1])


def _mean(values: NDArray[np.float64], where: Mask) -> float | None:
    return float(values[where].mean()) if where.mean() >= LEAST_SHARE else None


def _grown(mask: Mask) -> Mask:
    from skimage.morphology import dilation, disk

    return np.asarray(dilation(mask, disk(MARGIN))).astype(np.bool_)


Lpips = Callable[[Pixels, Pixels], float]


def find_lpips() -> Lpips | str:
    """LPIPS where the package and its weights are on this machine; else why not, in words. Nothing is downloaded."""
    from importlib.util import find_spec

    import torch

    weights = Path(torch.hub.get_dir(), "checkpoints", "alexnet-owt-7be5be79.pth")
    if find_spec("lpips") is None:
        return "LPIPS is left out: the package lpips is not installed"
    if not weights.is_file():
        return f"LPIPS is left out: its weights are not in {weights}; torchvision.models.alexnet fetches them"
    import lpips

    network: Any = lpips.LPIPS(net="alex", verbose=False).eval()

    def distance(first: Pixels, second: Pixels) -> float:
        batch = [torch.from_numpy(each).permute(2, 0, 1)[None].float() * 2 - 1 for each in (first, second)]
        with torch.no_grad():
            return float(network(*batch))

    return distance
