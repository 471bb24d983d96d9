"""Prompts of one's own, drawn while training as prediction draws them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image_finetune.command.cli import main
from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.families import FAMILIES, get_family
from qwen_image_finetune.judging.pages.reading import Version
from qwen_image_finetune.trainer import Trainer
from qwen_image_finetune.training.train import train

Configure = Callable[..., Config]
SEVERAL = next(name for name in sorted(FAMILIES) if get_family(name).max_references > 1)


def asking(samples: list[dict[str, object]], **more: object) -> str:
    settings = {"enabled": True, "steps": 2, "num_validation_samples": 1, "num_inference_steps": 4, "samples": samples}
    return f"validation={json.dumps({**settings, **more})}"


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize(("name", "cached"), [("FluxKontext", True), (SEVERAL, False)])
def test_they_are_what_prediction_draws(name: str, cached: bool, configure: Configure, pairs: Path) -> None:
    """With references, one or several, and a seed; and without either, at the size of what is trained on."""
    files = [pairs / "control_images" / f"{stem}.png" for stem in ("3", "0")][: get_family(name).max_references]
    samples: list[dict[str, object]] = [
        {"prompt": "a hat", "references": [os.path.relpath(file) for file in files], "seed": 11},
        {"prompt": "a garden"},
    ]
    cache = f"cache.use_cache={json.dumps(cached)}"
    config = configure(name, "train.max_train_steps=2", "optimizer.init_args.lr=0.0", cache, asking(samples, seed=3))
    run = train(config)
    assert run is not None
    strips = json.loads((run / "samples" / "step-2" / "layout.json").read_text())
    references = ["reference"] * len(files)
    assert [[part["name"] for part in strip["parts"]] for strip in strips] == [
        ["reference", "base", "drawn", "truth"], [*references, "base", "drawn"], ["base", "drawn"]
    ]  # fmt: skip
    assert [strip["prompt"] for strip in strips[1:]] == ["a hat", "a garden"]

    trainer = Trainer(config)
    size = Image.open(run / "samples" / "base" / "2.png").size
    for place, given, seed, sides in (
        (1, [Image.open(file) for file in files], 11, {}),
        (2, None, 3, {"width": size[0], "height": size[1]}),
    ):
        (wanted,) = trainer.predict(given, strips[place]["prompt"], 4, seed=seed, **sides)
        drawn = Image.open(run / "samples" / "base" / f"{place}.png")
        assert drawn.size == wanted.size and np.abs(pixels(drawn) - pixels(wanted)).max() <= 1
    assert size == (64, 64)  # as the first pair, at this resolution

    shown = {sample.key: sample for sample in Version(run).samples}
    assert shown["validation.samples[0]"].drawn.keys() == {2} and "truth" not in shown["validation.samples[0]"].pictures


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([{"prompt": "a"}, {"prompt": "a", "references": "no/such.png"}], "validation.samples[1].references: '"),
        ([{"prompt": "a", "references": [__file__]}], "validation.samples[0].references: "),
        ([{"prompt": "a", "references": ["PICTURE"] * 40}], "FluxKontext takes at most "),
    ],
)
def test_bad_references_are_refused_by_their_key(
    samples: list[dict[str, object]],
    words: str,
    configure: Configure,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = asking(samples).replace("PICTURE", str(pairs / "control_images" / "0.png"))
    configure("FluxKontext")
    assert main(["check", str(tmp_path / "config.yaml"), text]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (
            {"promt": "a"},
            "'validation.samples[0].promt' is not a key; validation.samples[0] has prompt, references, seed",
        ),
        ({"promt": "a"}, "validation.samples[0].prompt is missing: the instruction"),
        ({"prompt": "a", "seed": -1}, "validation.samples[0].seed=-1 is refused; allowed: whole number from 0"),
        ("a", "validation.samples[0]='a' is refused; allowed: a section with prompt, references, seed"),
    ],
)
def test_keys_of_a_sample_are_checked(sample: dict[str, object], words: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        configure("FluxKontext", asking([sample]))


def test_samples_without_validation_are_said_to_have_no_effect(configure: Configure) -> None:
    config = configure("FluxKontext", 'validation={"samples": [{"prompt": "a"}]}')
    assert any(note.startswith("validation.samples") for note in config.notes)
