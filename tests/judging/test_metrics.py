"""Every measure against a case worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from skimage import data
from torch import nn

from qwen_image_finetune.judging import metrics


def flat(*colour: float, size: tuple[int, int] = (32, 32)) -> metrics.Pixels:
    return np.broadcast_to(np.array(colour, dtype=np.float64), (*size, 3)).copy()


@pytest.fixture(scope="module")
def photograph() -> metrics.Pixels:
    return np.asarray(data.astronaut()[:192, 128:320], dtype=np.float64) / 255


def test_psnr() -> None:
    """A difference of 0.1 everywhere is a squared error of 0.01: 20 dB."""
    assert metrics.psnr(flat(0.5, 0.5, 0.5), flat(0.6, 0.6, 0.6)) == pytest.approx(20)
    half = flat(0.5, 0.5, 0.5)
    half[:16] += 0.1  # half the pixels: 10 log10(2) more
    assert metrics.psnr(half, flat(0.5, 0.5, 0.5)) == pytest.approx(20 + 10 * math.log10(2))
    assert metrics.psnr(half, half) == metrics.PSNR_LIMIT


def test_ssim() -> None:
    """Without variance only the luminance is left: (2 a b + C) / (a^2 + b^2 + C) with C = 0.01^2."""
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert metrics.ssim(flat(0.5, 0.5, 0.5), flat(0.6, 0.6, 0.6)) == pytest.approx(expected)
    assert metrics.ssim(flat(0, 0, 0, size=(8, 32)), flat(0, 0, 0, size=(8, 32))) is None


def test_ssim_of_opposites(photograph: metrics.Pixels) -> None:
    assert metrics.ssim(photograph, photograph) == pytest.approx(1)
    inverted = metrics.ssim(1 - photograph, photograph)
    assert inverted is not None and inverted < 0


def test_colour_difference_of_greys() -> None:
    """For neutral colours CIEDE2000 is |dL| / S_L with S_L = 1 + 0.015 (L - 50)^2 / sqrt(20 + (L - 50)^2)."""

    def lightness(grey: float) -> float:
        return 116 * ((grey + 0.055) / 1.055) ** (2.4 / 3) - 16

    first, second = lightness(0.4), lightness(0.5)
    middle = ((first + second) / 2 - 50) ** 2
    expected = (second - first) / (1 + 0.015 * middle / math.sqrt(20 + middle))
    found = metrics.colour_difference(flat(0.4, 0.4, 0.4), flat(0.5, 0.5, 0.5))
    assert found == pytest.approx(expected, abs=1e-2)


def test_changes_inside_and_outside() -> None:
    """The truth paints the left half white; the drawing does so by half, and shifts the right half by 10 of 255."""
    source = flat(0.2, 0.2, 0.2)
    truth, drawn = source.copy(), source.copy()
    truth[:, :16], drawn[:, :16] = 1.0, 0.6
    drawn[:, 16:] += 10 / 255
    found = metrics.measure(drawn, truth, source)
    assert found["change_inside"] == pytest.approx(0.4 * 255)
    assert found["change_outside"] == pytest.approx(10)
    drift = float(metrics.colour_difference(source, source + 10 / 255).mean())
    assert found["colour_drift"] == pytest.approx(drift) and drift > 1
    copied = metrics.measure(source, truth, source)
    assert copied["change_inside"] == copied["change_outside"] == copied["colour_drift"] == 0


def test_regions_that_are_not_there() -> None:
    source = flat(0.2, 0.2, 0.2)
    everything = metrics.measure(source, flat(0.9, 0.9, 0.9), source)
    assert everything["colour_drift"] is None and everything["change_outside"] is None
    nothing = metrics.measure(source, source, source)
    assert nothing["change_inside"] is None and nothing["colour_drift"] == 0
    assert metrics.measure(source, source, None)["change_outside"] is None
    given = np.zeros((32, 32), dtype=bool)
    given[:8] = True
    assert metrics.measure(source + 0.1, source, source, given)["change_inside"] == pytest.approx(25.5)


def test_nothing_to_correlate() -> None:
    assert metrics.displacement(flat(0.5, 0.5, 0.5), flat(0.5, 0.5, 0.5)) == (None, None)


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, -5), (-4, 3)])
def test_a_shift_is_its_length(shift: tuple[int, int]) -> None:
    whole = np.asarray(data.astronaut(), dtype=np.float64) / 255
    truth = whole[100:292, 150:342]
    drawn = whole[100 - shift[0] : 292 - shift[0], 150 - shift[1] : 342 - shift[1]]
    found, zoom = metrics.displacement(drawn, truth)
    assert found == pytest.approx(math.hypot(*shift), abs=0.15)
    assert zoom == pytest.approx(0, abs=0.4)


@pytest.mark.parametrize("percent", [-4.0, 2.0, 4.0])
def test_an_enlargement_is_its_percentage(percent: float) -> None:
    from PIL import Image

    whole = Image.fromarray(data.astronaut())
    side, (x, y) = 192 / (1 + percent / 100), (246, 196)
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    truth = whole.crop((x - 96, y - 96, x + 96, y + 96))
    drawn = whole.resize((192, 192), Image.Resampling.BICUBIC, box=box)
    _, zoom = metrics.displacement(metrics.pixels(drawn), metrics.pixels(truth))
    assert zoom == pytest.approx(abs(percent), abs=0.6)


def test_lpips_says_why_it_is_left_out(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    reason = metrics.find_lpips()
    assert isinstance(reason, str) and "left out" in reason


@pytest.fixture
def alexnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Random weights where torchvision keeps the published ones, in the same file format."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network: nn.Module = torchvision.models.alexnet()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth")
    return network.double().eval()


@pytest.mark.filterwarnings("ignore:.*'(pretrained|weights)':UserWarning")  # how lpips asks torchvision
@torch.no_grad()
def test_lpips_is_the_weighted_distance_of_normalised_features(alexnet: nn.Module) -> None:
    """Zhang et al. 2018, equation 1, in float64 on the layers that they name."""
    from importlib.resources import files

    measure = metrics.find_lpips()
    assert callable(measure), measure
    first, second = (rng.random((80, 72, 3), dtype=np.float32) for rng in map(np.random.default_rng, (1, 2)))
    weights = torch.load(str(files("lpips") / "weights/v0.1/alex.pth"), map_location="cpu", weights_only=True)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    states = [((torch.from_numpy(each).double() - mean) / deviation).permute(2, 0, 1)[None] for each in (first, second)]
    expected = 0.0
    for number, layer in enumerate(alexnet.get_submodule("features").children()):
        states = [layer(state) for state in states]
        if number in (1, 4, 7, 9, 11):
            units = [state / state.norm(dim=1, keepdim=True) for state in states]
            lin = weights[f"lin{(1, 4, 7, 9, 11).index(number)}.model.1.weight"].double()
            expected += float((lin * (units[0] - units[1]).square()).sum(1).mean())
    assert measure(first, second) == pytest.approx(expected, rel=1e-3)
    assert measure(first, first) == 0
