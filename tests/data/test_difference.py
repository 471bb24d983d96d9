"""loss.mask_loss=difference: the edit found in the pair itself, with the cache and without, and shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config
from qwen_image_finetune.data.difference import difference_map
from qwen_image_finetune.training.train import train

SIZE = 192


def noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(40, 200, (SIZE, SIZE, 3))


def test_what_was_painted_is_white_and_noise_is_black() -> None:
    rng = np.random.default_rng(0)
    source = noise(rng)
    target = source + rng.integers(-2, 3, source.shape)  # as compression leaves it
    target[40:100, 60:150] += 50
    ours, theirs = (Image.fromarray(pixels.clip(0, 255).astype(np.uint8)) for pixels in (target, source))
    found = np.asarray(difference_map(theirs, ours))
    assert (found[45:95, 65:145] == 255).all()
    outside = found.copy()
    outside[30:110, 50:160] = 0
    assert not outside.any()
    assert not np.asarray(difference_map(theirs, theirs)).any()


@pytest.fixture
def painted(tmp_path: Path) -> Path:
    """Two pairs whose targets have a square painted in the left half."""
    rng, folder = np.random.default_rng(1), tmp_path / "painted"
    for part in ("control_images", "training_images"):
        (folder / part).mkdir(parents=True)
    for name in "ab":
        source = Image.fromarray(noise(rng).astype(np.uint8)).resize((64, 64)).resize((SIZE, SIZE))
        target = source.copy()
        target.paste((255, 0, 0), (0, 0, SIZE // 2, SIZE))
        source.save(folder / "control_images" / f"{name}.png")
        target.save(folder / "training_images" / f"{name}.png")
        (folder / "training_images" / f"{name}.txt").write_text("paint it")
    return folder


def test_a_run_weighs_by_it(
    painted: Path, configure: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same losses with the cache and without, other ones than without weights; a mask file drawn from the map
    gives the same once more."""
    options = (f"data.init_args.dataset_path={painted}", "train.max_train_steps=2", "loss.background_weight=0")
    weighed = (*options, "loss.mask_loss=difference")

    def losses(name: str, *overrides: str) -> list[float]:
        run = train(configure("FluxKontext", *overrides, f"logging.tracker_project_name={name}"))
        assert run is not None
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    cached = losses("cached", *weighed)
    assert losses("uncached", *weighed, "cache.use_cache=false") == cached
    assert losses("plain", *options[:2]) != pytest.approx(cached, rel=1e-3)

    assert main(["check", str(tmp_path / "config.yaml"), *weighed, "--maps", str(tmp_path / "maps")]) == 0
    assert "% of a picture is the edit" in capsys.readouterr().out
    with Image.open(tmp_path / "maps" / "a.png") as strip:
        assert strip.width == 3 * strip.height
        drawn = torch.from_numpy(np.asarray(strip.convert("L"), dtype=np.float32))[:, 2 * strip.height :]
    half = drawn.shape[1] // 2
    assert drawn[:, : half - 4].mean() > 240 and drawn[:, half + 4 :].mean() < 5
