"""Settings that each of several data sets has for itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.data.images import DataError
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
        return {key for variations in found._row_keys for keys in variations for text in keys.texts for key in text}

    prefixed = texts(entry)
    for stem, caption in zip(("1", "3"), captions, strict=True):
        (few / f"training_images/{stem}.txt").write_text(f"ink, {caption}")
    assert prefixed == texts(f"data.init_args.dataset_path=[{pairs}, {few}]")


def sets(*entries: str) -> str:
    return f"data.init_args.dataset_path=[{', '.join(f'{{{entry}}}' for entry in entries)}]"


def weights(version: Path | None) -> dict[str, torch.Tensor]:
    assert version is not None
    folder = max(version.glob("checkpoint-*-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_all_at_once_with_the_cache_without_and_resumed(
    configure: Configure, pairs: Path, few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, turns of sizes, prompts that are drawn, identity pairs and dropouts of single sets: the same bits."""
    (few / "training_images/1.txt").write_text("a cat\n\n  a dog \na bird\n")
    entries = sets(
        f"path: {pairs}, weight: 1, caption_dropout_rate: 0.5",
        f"path: {few}, weight: 2, prompt_per_line: true, resolution: [32, 64], prompt_image_dropout_rate: 0.5",
        f"path: {few}, weight: 1, identity: [keep it as it is, change nothing], image_size: [64, 32]",
    )
    options = (entries, "data.batch_size=2", "train.max_train_steps=6", "train.checkpointing_steps=3")
    whole = train(configure("FluxKontext", *options))
    said = capsys.readouterr().out
    for words in (
        "an epoch has 11 visits: 3 (27%) to the 7 of 1-", "5 (45%) to the 2 of 2-few", "3 (27%) to the 2 of 3-few",
        "visits to each of the 2 pairs of 2-few take turns at the sizes 64, 32",
        "2 identity pairs of 3-few: the source as it is, asked for with 'keep it as it is', 'change nothing'",
        "2 of 11 rows may have several prompts, of which one is drawn a visit",
    ):  # fmt: skip
        assert words in said
    assert whole is not None
    going_on = f"train.resume_from_checkpoint={next(whole.glob('checkpoint-*-3'))}"
    elsewhere = ("cache.use_cache=false", "logging.tracker_project_name=resumed")
    resumed = train(configure("FluxKontext", *options, going_on, *elsewhere))
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(whole).items())
    capsys.readouterr()
    changed = (entries.replace("weight: 2", "weight: 3"), *options[1:], going_on, "train.max_train_steps=4")
    train(configure("FluxKontext", *changed, "logging.tracker_project_name=changed"))
    assert "what data sets have of their own (weights, sizes, dropouts)=" in capsys.readouterr().out


def test_several_prompts_of_a_pair(configure: Configure, few: Path, tmp_path: Path) -> None:
    """One is drawn a visit, each about as often; the cache holds what a caption with that line alone would make."""
    lines = ["a cat", "a dog", "a bird"]
    (few / "training_images/1.txt").write_text("a cat\r\n\n  a dog \na bird\n")
    plain = f"data.init_args.dataset_path={few}"
    family = get_family("FluxKontext")

    def encoded(*overrides: str) -> EncodedDataset:
        config = configure("FluxKontext", *overrides)
        folder = Path(config.model.pretrained_model_name_or_path)
        found = EncodedDataset(config, family, open_pairs(config, family).training, folder, torch.float32)
        found.missing()
        return found

    assert encoded(plain).dataset.prompts(0) == ("a cat\n\n  a dog \na bird",)  # line breaks alone mean nothing
    rows = encoded(f"data.init_args.dataset_path=[{{path: {few}, prompt_per_line: true, prefix: 'ink, '}}]")
    assert rows.dataset.prompts(0) == tuple(f"ink, {line}" for line in lines)
    assert rows.dataset.prompt(0) == "ink, a cat"
    drawn = [rows.dataset.load(0, visit).prompt for visit in range(300)]
    assert all(80 < drawn.count(f"ink, {line}") < 120 for line in lines)
    assert drawn == [rows.dataset.load(0, visit).prompt for visit in range(300)]
    keys = rows._row_keys[0][0].texts[0]
    assert [keys[rows.dataset.wording(0, visit, 3)] for visit in range(300)] == [
        keys[lines.index(prompt.removeprefix("ink, "))] for prompt in drawn
    ]
    for line, key in zip(lines, keys, strict=True):
        (few / "training_images/1.txt").write_text(f"ink, {line}")
        assert encoded(plain)._row_keys[0][0].texts[0] == (key,)
    # A list in a table means the same without a word; pairs that are held out have the first.
    shutil.copytree(few, table := tmp_path / "table")
    (table / "metadata.jsonl").write_text(
        '{"image": "training_images/1.png", "edit_image": "control_images/1.png", "prompt": ["a cat", "a dog"]}\n'
    )
    config = configure("FluxKontext", f"data.init_args.dataset_path={table}")
    dataset = open_pairs(config, family).training
    assert dataset.prompts(0) == ("a cat", "a dog") and dataset.load(0).prompt == "a cat"
    assert {dataset.load(0, visit).prompt for visit in range(20)} == {"a cat", "a dog"}


def test_sizes_and_identity_of_a_set(configure: Configure, pairs: Path, few: Path) -> None:
    """A set is seen at its own sizes, in turn; an identity pair wants the picture that it shows."""
    entries = sets(f"path: {pairs}", f"path: {few}, resolution: [32, 64, 96]", f"path: {few}, identity: stay")
    config, family = configure("FluxKontext", entries), get_family("FluxKontext")
    dataset = open_pairs(config, family).training
    assert [dataset.turns(row) for row in (0, 7, 9)] == [1, 3, 1]
    size = {side: family.size(64, 64, side * side) for side in (32, 64, 96)}
    assert dataset.geometry(0, 5)[0] == dataset.geometry(9)[0] == size[64]
    sizes = [dataset.geometry(7, visit) for visit in range(6)]
    assert len(set(sizes[:3])) == 3 and sizes[:3] == sizes[3:]
    assert dataset.geometry(7) == max(sizes)
    identity = dataset.load(9)
    assert identity.prompt == "stay"
    assert identity.target.size == identity.reference_sizes[0]
    plan = dataset.plan(9)
    assert plan.target.path == plan.references[0].path and plan.target.path.parent.name == "control_images"
    batches = plan_batches(config, dataset, 1)
    for batch in batches.epoch(2):
        for row, visit in zip(batch.rows, batch.visits, strict=True):
            example = dataset.load(row, visit)
            assert (example.target.size, *example.reference_sizes) == dataset.geometry(row, visit)


def test_identity_pairs_are_never_held_out(configure: Configure, pairs: Path) -> None:
    entries = f"data.init_args.dataset_path=[{pairs}, {{path: {pairs}, identity: stay}}]"
    found = open_pairs(
        configure("FluxKontext", entries, "validation={enabled: true, share: 0.3}"), get_family("FluxKontext")
    )
    assert found.held_out is not None and len(found.held_out) + len(found.training) < 14
    assert not any(row.shared.identity for row in found.held_out.rows)
    held = {row.reference_names[0] for row in found.held_out.rows}
    assert not held & {row.reference_names[0] for row in found.training.rows}  # nor trained on in another way


def test_what_entries_cannot_be(configure: Configure, captioned: Path) -> None:
    for words, entries in {
        r"weight is given for some data sets and not for a": "[a, {path: b, weight: 1}]",
        r"weight=2\.0 and repeats=3 of b exclude each other": "[{path: b, weight: 2, repeats: 3}]",
        r"image_size=\[4, 4\] and resolution=8 of b exclude": "[{path: b, image_size: [4, 4], resolution: 8}]",
        r"dataset_path\[0\]\.weight=0 is refused; allowed: number above 0": "[{path: b, weight: 0}]",
        r"dataset_path\[1\]\.wieght' is not a key": "[a, {path: b, wieght: 1}]",
    }.items():
        with pytest.raises(ConfigError, match=words):
            configure("FluxKontext", f"data.init_args.dataset_path={entries}")
    entries = f"data.init_args.dataset_path=[{{path: {captioned}, identity: stay}}]"
    with pytest.raises(DataError, match=r"no reference, which a pair of an identity set is made of"):
        open_pairs(configure("FluxKontext", entries), get_family("FluxKontext"))
