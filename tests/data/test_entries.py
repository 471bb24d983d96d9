"""Settings that each of several data sets has for itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_image_finetune.config import Config
from qwen_image_finetune.encoding.cache import EncodedDataset
from qwen_image_finetune.encoding.pairs import open_pairs
from qwen_image_finetune.families import get_family
from qwen_image_finetune.training.job import plan_batches
from qwen_image_finetune.training.train import train

Configure = Callable[..., Config]


@pytest.fixture
def few(pairs: Path, tmp_path: Path) -> Path:
    """Two of the pairs, in a folder of their own."""
    for stem in ("1", "3"):
        for part in ("control_images", "training_images"):
            (tmp_path / "few" / part).mkdir(parents=True, exist_ok=True)
            for file in (pairs / part).glob(f"{stem}.*"):
                shutil.copy(file, tmp_path / "few" / part)
    return tmp_path / "few"


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what is encoded is looked at."""
    return tmp_path / "cache"


def test_prefix_and_repeats(configure: Configure, pairs: Path, few: Path) -> None:
    """The prompt is what a caption with the prefix in it would be, in the cache as well; two of nine count thrice."""
    entry = f"data.init_args.dataset_path=[{pairs}, {{path: {few}, repeats: 3, prefix: 'ink, '}}]"
    config, family = configure("FluxKontext", entry, "data.batch_size=2"), get_family("FluxKontext")
    training = open_pairs(config, family).training
    captions = [(few / f"training_images/{stem}.txt").read_text() for stem in ("1", "3")]
    assert [training.prompt(row) for row in (7, 8)] == [f"ink, {caption.strip()}" for caption in captions]
    batches = plan_batches(config, training, 1).epoch(1)
    seen = sorted(pair for batch in batches for pair in zip(batch.rows, batch.visits, strict=True))
    assert seen == [(row, 1) for row in range(7)] + [(row, visit) for row in (7, 8) for visit in (3, 4, 5)]

    def texts(*overrides: str) -> set[str]:
        config = configure("FluxKontext", *overrides)
        folder = Path(config.model.pretrained_model_name_or_path)
        found = EncodedDataset(config, family, open_pairs(config, family).training, folder, torch.float32)
        found.missing()
        return {key for variations in found._row_keys for keys in variations for key in keys.texts}

    prefixed = texts(entry)
    for stem, caption in zip(("1", "3"), captions, strict=True):
        (few / f"training_images/{stem}.txt").write_text(f"ink, {caption}")
    assert prefixed == texts(f"data.init_args.dataset_path=[{pairs}, {few}]")


def test_repeats_with_the_cache_and_without(
    configure: Configure, pairs: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = f"data.init_args.dataset_path=[{pairs}, {{path: {few}, repeats: 3, prefix: 'ink, '}}]"
    options = (entry, "train.num_epochs=1", "train.max_train_steps=null", "data.batch_size=2")
    found = []
    for name in ("true", "false"):
        version = train(configure("FluxKontext", *options, f"cache.use_cache={name}"))
        assert version is not None
        found.append(load_file(next(version.glob("checkpoint-*")) / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    checkpoint = next((tmp_path / "output/project/v0").glob("checkpoint-*"))
    changed = entry.replace("repeats: 3", "repeats: 2")
    train(configure("FluxKontext", changed, *options[1:], f"train.resume_from_checkpoint={checkpoint}"))
    assert "the number of visits in an epoch (repeats of the data sets)=11, but" in capsys.readouterr().out
