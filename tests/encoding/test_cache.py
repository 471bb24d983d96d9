"""The cache is keyed by what decides an embedding; nothing else misses, and an interrupted run goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config
from qwen_image_finetune.encoding import cache
from qwen_image_finetune.encoding.cache import EncodedDataset, TextVariant
from qwen_image_finetune.encoding.pairs import open_dataset
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Reference
from qwen_image_finetune.fitting.estimate import BYTES, Estimator
from qwen_image_finetune.levers import tiling
from qwen_image_finetune.levers.quantize import relative_error
from qwen_image_finetune.levers.quantized_linear import QuantizedLinear
from qwen_image_finetune.records import collate
from tests.kin import EDITING, TWO

Configure = Callable[..., Config]
CPU = {"default": torch.device("cpu")}


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Its own: what is encoded is looked at."""
    return tmp_path / "cache"


def open_rows(config: Config, name: str, dtype: torch.dtype = torch.float32) -> EncodedDataset:
    family = get_family(name)
    folder = Path(config.model.pretrained_model_name_or_path)
    return EncodedDataset(config, family, open_dataset(config, family), folder, dtype)


@pytest.fixture
def own_pairs(pairs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pairs, tmp_path / "own"))


def lacking(config: Config, name: str) -> tuple[int, int]:
    missing = open_rows(config, name).missing()
    return len(missing.texts), len(missing.images)


@pytest.mark.parametrize("name", EDITING)
def test_only_what_decides_an_embedding_misses(
    name: str, configure: Configure, own_pairs: Path, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoints[name], tmp_path / "copy"))
    model, data = f"model.pretrained_model_name_or_path={copy}", f"data.init_args.dataset_path={own_pairs}"
    config = configure(name, model, data)
    rows = open_rows(config, name)
    cache.fill(rows, rows.missing(), CPU, shown=False)
    assert lacking(config, name) == (0, 0)
    sees = get_family(name).text_sees_references

    # Nothing that decides an embedding changed
    for unrelated in (
        "train.seed=7",
        "data.batch_size=3",
        "optimizer.init_args.lr=0.5",
        "data.shuffle=false",
        "model.lora.r=8",
        "train.sigma_shift=3.0",
        "data.init_args.caption_dropout_rate=0.0",
    ):
        assert lacking(configure(name, model, data, unrelated), name) == (0, 0), unrelated
    for file in own_pairs.rglob("*"):
        os.utime(file, (1, 1))
    moved = Path(shutil.move(own_pairs, tmp_path / "moved"))
    data = f"data.init_args.dataset_path={moved}"
    config = configure(name, model, data)
    assert lacking(config, name) == (0, 0)

    # A caption, a target, a reference, a size, the precision
    caption = moved / "training_images" / "0.txt"
    caption.write_text("something else")
    assert lacking(config, name) == (1, 0)
    caption.write_text("edit number 0")
    target = moved / "training_images" / "1.png"
    kept = target.read_bytes()
    Image.open(target).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target)
    assert lacking(config, name) == (0, 1)
    target.write_bytes(kept)
    reference = moved / "control_images" / "2.png"
    kept = reference.read_bytes()
    Image.open(reference).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(reference)
    assert lacking(config, name) == (int(sees), 1)
    reference.write_bytes(kept)
    assert lacking(config, name) == (0, 0)
    resized = configure(name, model, data, "data.init_args.resolution=96")
    assert lacking(resized, name) == (7 if sees else 0, 14)
    missing = open_rows(config, name, torch.bfloat16).missing()
    assert (len(missing.texts), len(missing.images)) == (7, 14)

    # Other weights of an encoder: its entries alone
    for part, expected in (("transformer", (0, 0)), ("vae", (0, 14)), ("text_encoder", (7, 14))):
        weights = next((copy / part).glob("*.safetensors"))
        state = load_file(weights)
        first = sorted(state)[0]
        state[first] = state[first] + 1
        save_file(state, weights, metadata={"format": "pt"})
        assert lacking(config, name) == expected, part


def test_families_with_the_same_encoders_share_pictures_but_no_texts(
    configure: Configure, tiny_checkpoints: dict[str, Path]
) -> None:
    """Qwen-Image-Edit and its successor have one text encoder, and different words and sizes around a prompt."""
    first, second = "QwenImageEdit", "QwenImageEditPlus"
    for part in get_family(first).text_components:
        files = [{file.name: file.read_bytes() for file in (tiny_checkpoints[name] / part).iterdir()}
                 for name in (first, second)]  # fmt: skip
        assert files[0] == files[1], part
    rows = open_rows(configure(first), first)
    cache.fill(rows, rows.missing(), CPU, shown=False)
    assert lacking(configure(second), second) == (7, 0)


def test_the_order_of_references_counts(configure: Configure, write_pairs: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "two", [(64, 64)], references=2)
    config = configure("FluxKontext", f"data.init_args.dataset_path={folder}")
    rows = open_rows(config, "FluxKontext")
    cache.fill(rows, rows.missing(), CPU, shown=False)
    first, second = rows.read(0).references
    names = [folder / "control_images" / name for name in ("0.png", "0_control_1.png")]
    contents = [path.read_bytes() for path in names]
    for path, content in zip(names, reversed(contents), strict=True):
        path.write_bytes(content)
    swapped = open_rows(config, "FluxKontext")
    assert len(swapped.missing()) == 0, "each picture is still known"
    assert torch.equal(swapped.read(0).references[0], second)
    assert torch.equal(swapped.read(0).references[1], first)


@pytest.mark.parametrize("name", TWO)
def test_an_interrupted_caching_run_continues_where_it_was(name: str, configure: Configure) -> None:
    config = configure(name)
    rows = open_rows(config, name)
    encode = rows.family.encode_image
    calls = 0

    def failing(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return encode(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rows.family), "encode_image", lambda self, *arguments: failing(*arguments))
        with pytest.raises(KeyboardInterrupt):
            cache.fill(rows, rows.missing(), CPU, shown=False)
    assert lacking(config, name) == (0, 14 - 5)


@pytest.mark.parametrize("name", TWO)
def test_every_row_keeps_its_own_caption(name: str, configure: Configure, tiny_checkpoints: dict[str, Path]) -> None:
    """Whatever the order of filling and reading: each cached text is the embedding of that row's own file."""
    config = configure(name, "data.init_args.caption_dropout_rate=0.5", "data.init_args.prompt_image_dropout_rate=0.5")
    rows = open_rows(config, name)
    missing = rows.missing()
    shuffled = cache.Missing(dict(reversed(missing.images.items())), dict(reversed(missing.texts.items())), 0)
    cache.fill(rows, shuffled, CPU, shown=False)
    pipe = rows.family.pipeline.from_pretrained(tiny_checkpoints[name])
    for index in (4, 0, 6):
        for variant in (TextVariant(), TextVariant(""), TextVariant(None, False), TextVariant("", False)):
            stored, fresh = rows.read(index, variant), rows.encode(pipe, rows.dataset.load(index), variant)
            assert torch.equal(stored.target, fresh.target)
            assert len(stored.references) == len(fresh.references) == int(variant.references)
            for ours, theirs in zip(stored.references, fresh.references, strict=True):
                assert torch.equal(ours, theirs)
            for key, tensor in fresh.text.items():
                assert torch.equal(stored.text[key], tensor)
    for stream in rows.family.text_embeddings:
        with_caption, dropped = (rows.read(0, variant).text[stream] for variant in (TextVariant(), TextVariant("")))
        if with_caption.is_floating_point():  # integers say where tokens stand
            assert with_caption.shape != dropped.shape or not torch.equal(with_caption, dropped)


@pytest.mark.parametrize("name", TWO)
def test_visits_take_turns_at_the_stored_crops_and_flips(
    name: str, configure: Configure, tiny_checkpoints: dict[str, Path]
) -> None:
    random = (
        "data.init_args.random_crop=true",
        "data.init_args.crop_scale=[0.5,0.9]",
        "data.init_args.random_flip=true",
    )
    rows = open_rows(configure(name, *random, "cache.num_variations=3"), name)
    missing = rows.missing()
    assert len(missing.images) == 3 * 14
    assert len(missing.texts) == (3 if rows.family.text_sees_references else 1) * 7
    cache.fill(rows, missing, CPU, shown=False)
    pipe = rows.family.pipeline.from_pretrained(tiny_checkpoints[name])
    for index, visit in ((0, 0), (0, 1), (5, 2), (5, 7)):
        stored = rows.read(index, visit=visit)
        fresh = rows.encode(pipe, rows.dataset.load(index, visit % 3))
        pairs = [(stored.target, fresh.target), *zip(stored.references, fresh.references, strict=True)]
        pairs += [(stored.text[key], tensor) for key, tensor in fresh.text.items()]
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not torch.equal(rows.read(0, visit=0).target, rows.read(0, visit=1).target)


def test_pairs_that_are_not_trained_on_are_seen_as_they_are(configure: Configure) -> None:
    random = (
        "data.init_args.random_crop=true",
        "data.init_args.crop_scale=[0.5,0.9]",
        "data.init_args.random_flip=true",
    )

    def entries(*overrides: str, trained_on: bool) -> set[str]:
        config, family = configure("FluxKontext", "cache.num_variations=3", *overrides), get_family("FluxKontext")
        folder, dataset = Path(config.model.pretrained_model_name_or_path), open_dataset(config, family)
        rows = EncodedDataset(config, family, dataset, folder, torch.float32, trained_on)
        return set(rows.missing().images)

    assert entries(*random, trained_on=False) == entries(trained_on=False) == entries(trained_on=True)
    assert entries(*random, trained_on=False).isdisjoint(entries(*random, trained_on=True))


def test_a_dropped_prompt_replaces_only_the_configured_embeddings(configure: Configure) -> None:
    config = configure(
        "FluxKontext", "data.init_args.caption_dropout_rate=0.5", "cache.prompt_empty_drop_keys=[prompt_embeds]"
    )
    rows = open_rows(config, "FluxKontext")
    cache.fill(rows, rows.missing(), CPU, shown=False)
    own, dropped = rows.read(0).text, rows.read(0, TextVariant("")).text
    assert torch.equal(own["pooled_prompt_embeds"], dropped["pooled_prompt_embeds"])
    assert not torch.equal(own["prompt_embeds"], dropped["prompt_embeds"])
    variants = [TextVariant(), TextVariant(""), TextVariant("")]
    batch = rows.read_batch((0, 0, 0), variants, (0, 0, 0))
    expected = collate([rows.read(0, variant) for variant in variants])
    for name, tensor in expected.text.items():
        assert torch.equal(batch.text[name], tensor)


def test_a_batch_lies_where_it_was_read(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_rows(configure("FluxKontext"), "FluxKontext")
    cache.fill(rows, rows.missing(), CPU, shown=False)
    shapes = [rows.read(index).target.shape for index in range(7)]
    alike = [index for index in range(7) if shapes.count(shapes[index]) > 1]
    indices = [*alike[:1] * 2, *(index for index in alike if shapes[index] == shapes[alike[0]])]
    assert len(set(indices)) > 1
    expected = collate([rows.read(index) for index in indices])
    monkeypatch.setattr(torch, "stack", None)  # nothing is copied
    batch = rows.read_batch(indices, [TextVariant()] * len(indices), [0] * len(indices))
    assert batch.keys == expected.keys
    assert torch.equal(batch.target, expected.target)
    assert torch.equal(batch.references[0], expected.references[0])
    assert all(torch.equal(batch.text[name], tensor) for name, tensor in expected.text.items())


@pytest.mark.parametrize(("name", "format"), [("FluxKontext", "fp8"), ("QwenImageEdit", "int8")])
def test_text_encoders_in_8_bits_give_what_their_stored_weights_mean(
    name: str, format: str, configure: Configure
) -> None:
    """Against the plain encoder with the same rounded weights, to the bit; the VAE and its entries are as they were."""
    config = configure(name, f"model.quantize_text_encoders={format}")
    family, folder = get_family(name), Path(config.model.pretrained_model_name_or_path)
    said: list[str] = []
    narrow = loading.load_encoders(family, folder, torch.float32, CPU, vae=False, text_format=format, say=said.append)
    plain = loading.load_encoders(family, folder, torch.float32, CPU, vae=False)
    spared = 0.0
    for part in (part for part in family.text_components if part.startswith("text_encoder")):
        for layer_name, layer in narrow.components[part].named_modules():
            if isinstance(layer, QuantizedLinear):
                weight = plain.components[part].get_submodule(layer_name).weight
                spared += weight.numel() * (4 - BYTES["fp8"])
                assert relative_error(weight, layer) < 0.05
                assert not layer.may_compute_in_8_bits
                weight.copy_(layer.dequantised(torch.float32))
    assert [line.partition(f" in {format}: ")[0] for line in said] == [
        part for part in family.text_components if part.startswith("text_encoder")
    ]
    rows, exact = open_rows(config, name), open_rows(configure(name), name)
    example = rows.example(0)
    references = [Reference(*one) for one in zip(example.references, example.reference_sizes, strict=True)]
    ours = family.encode_text(narrow, example.prompt, references)
    theirs = family.encode_text(plain, example.prompt, references)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    wide, less = (Estimator(family, each, folder).encoders() for each in (configure(name), config))
    assert wide - less == pytest.approx(spared, rel=2e-3)  # the files are in float32

    missing, expected = rows.missing(), exact.missing()
    assert missing.images.keys() == expected.images.keys() and missing.texts.keys().isdisjoint(expected.texts)


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_large_pictures_are_encoded_in_tiles(name: str, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the limit to the bit as before; above it near the whole, each tile for itself, and under another key."""
    monkeypatch.setattr(tiling, "TILE", 128)
    monkeypatch.setattr(tiling, "STRIDE", 96)
    family, folder = get_family(name), Path(configure(name).model.pretrained_model_name_or_path)
    pipe = loading.load_encoders(family, folder, torch.float32, CPU, text=False)
    noise = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    rows = open_rows(configure(name, "model.vae_tiling=true"), name)
    plain = open_rows(configure(name), name).missing()
    whole = family.encode_image(pipe, picture)
    assert torch.equal(rows._latent(pipe, picture), whole)
    assert rows.missing().images.keys() == plain.images.keys()

    monkeypatch.setattr(tiling, "ABOVE", 0)
    ours = rows._latent(pipe, picture)
    assert float((ours - whole).norm() / whole.norm()) < 0.3
    cells = whole.shape[-1] * 96 // 256  # of the first tile, up to where the next begins
    alone = family.encode_image(pipe, picture.crop((0, 0, 128, 128)))
    torch.testing.assert_close(ours[:, :cells, :cells], alone[:, :cells, :cells], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[:, :cells, :cells], whole[:, :cells, :cells], rtol=1e-4, atol=1e-4)
    tiled = rows.missing()
    assert tiled.images.keys().isdisjoint(plain.images) and tiled.texts.keys() == plain.texts.keys()


def test_a_damaged_entry_is_noticed_and_rebuilt(configure: Configure) -> None:
    config = configure("FluxKontext")
    rows = open_rows(config, "FluxKontext")
    cache.fill(rows, rows.missing(), CPU, shown=False)
    expected = rows.read(3)
    path = next(path for path in rows.store.folder.rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    missing = rows.missing(verify=True)
    assert missing.damaged == len(missing) == 1
    cache.fill(rows, missing, CPU, shown=False)
    assert len(rows.missing(verify=True)) == 0
    assert torch.equal(rows.read(3).target, expected.target)


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_processes_are_disjoint_and_complete(configure: Configure, processes: int) -> None:
    missing = open_rows(configure("QwenImageEdit"), "QwenImageEdit").missing()
    shares = [missing.share(rank, processes) for rank in range(processes)]
    for kind in ("images", "texts"):
        keys: Iterator[str] = (key for share in shares for key in getattr(share, kind))
        assert sorted(keys) == sorted(getattr(missing, kind))


def test_masks_become_shares_of_latent_cells() -> None:
    mask = Image.new("L", (32, 16))
    mask.paste(255, (0, 0, 12, 16))
    cells = cache.latent_mask(mask, torch.zeros(16, 2, 4))
    assert torch.allclose(cells, torch.tensor([[1.0, 0.5, 0.0, 0.0]] * 2))
