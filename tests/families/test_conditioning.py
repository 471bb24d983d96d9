"""What training and prediction feed the transformer equals, to the last bit, what diffusers' own pipelines feed it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config
from qwen_image_finetune.data.dataset import ImageDataset
from qwen_image_finetune.drawing.predict import Predictor, draw_noise
from qwen_image_finetune.encoding.cache import EncodedDataset, fill
from qwen_image_finetune.families import FAMILIES, get_family
from qwen_image_finetune.families.base import Asked, Family, Reference
from qwen_image_finetune.families.flux_kontext import image_ids
from qwen_image_finetune.families.packing import pack, unpack
from qwen_image_finetune.records import Encoded, collate

AREA = 128 * 96
PROMPT = "turn it into a sketch"
GUIDANCE = 2.5
FAMILY_NAMES = sorted(FAMILIES)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return get_family(request.param)


@pytest.fixture(scope="module")
def pipe(family: Family, tiny_checkpoints: dict[str, Path]) -> DiffusionPipeline:
    pipe = family.pipeline.from_pretrained(tiny_checkpoints[family.name])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def predictor(family: Family, pipe: DiffusionPipeline, tiny_checkpoints: dict[str, Path]) -> Predictor:
    scheduler = loading.load_scheduler(tiny_checkpoints[family.name])
    return Predictor(family, pipe, pipe.transformer, scheduler, AREA)


class Enough(Exception):
    """Ends a pipeline once its transformer was asked."""


@contextmanager
def calls_of(transformer: torch.nn.Module, first: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Every keyword argument the transformer is called with; of the first call alone, which ends what asks for it."""
    seen: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(
            {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        )
        if first:
            raise Enough

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with pytest.raises(Enough) if first else nullcontext():
            yield seen
    finally:
        hook.remove()


def run_pipeline(
    family: Family,
    pipe: DiffusionPipeline,
    images: list[Image.Image],
    width: int,
    height: int,
    steps: int = 2,
    guidance: float = GUIDANCE,
) -> Image.Image:
    """The pipeline's picture, with the references at the test's area."""
    return family.oracle(pipe, Asked(PROMPT, images, (width, height), steps, guidance, AREA, seed=7))


def assert_same_calls(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        for name in their.keys() - {"return_dict", "attention_kwargs", "joint_attention_kwargs"}:
            expected, given = their[name], our.get(name)
            if isinstance(expected, torch.Tensor):
                assert given.dtype == expected.dtype and torch.equal(given, expected), name
            else:
                assert given == expected, name


@pytest.mark.parametrize(
    "image_size,output",
    [((128, 96), (128, 96)), ((150, 210), (96, 128)), ((280, 100), (160, 96)), ((333, 777), (80, 176))],
)
def test_prediction_equals_the_pipeline_pixel_for_pixel(
    family: Family, pipe: DiffusionPipeline, predictor: Predictor, image_size: tuple[int, int], output: tuple[int, int]
) -> None:
    images = [picture(*image_size)][: family.max_references]
    width, height = (side // family.side_multiple * family.side_multiple for side in output)
    with calls_of(pipe.transformer) as theirs:
        expected = run_pipeline(family, pipe, images, width, height)
    with calls_of(pipe.transformer) as ours:
        drawn = predictor.predict(images, PROMPT, 2, guidance_scale=GUIDANCE, width=width, height=height, seed=7)
    assert_same_calls(ours, theirs)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(expected))
    assert np.asarray(expected).std() > 1, "a constant picture proves nothing"


@pytest.mark.parametrize("image_size", [(128, 96), (150, 210)])
def test_training_feeds_what_the_pipeline_feeds(
    family: Family, pipe: DiffusionPipeline, image_size: tuple[int, int], tmp_path: Path
) -> None:
    """A row out of the store, at the pipeline's own noise and timestep, calls the transformer as the pipeline does."""
    references = [picture(*image_size, seed=1)][: family.max_references]
    for folder, suffix in (("training_images", 2), ("control_images", 1))[: 1 + len(references)]:
        (tmp_path / folder).mkdir()
        picture(*image_size, seed=suffix).save(tmp_path / folder / "one.png")
    (tmp_path / "training_images" / "one.txt").write_text(PROMPT)
    config = Config.model_validate(
        {
            "model": {"pretrained_model_name_or_path": str(pipe.config._name_or_path)},
            "data": {"init_args": {"dataset_path": str(tmp_path)}},
            "cache": {"use_cache": True, "cache_dir": str(tmp_path / "cache")},
        }
    )
    # An area that no side of resolution**2 gives: the pipeline of the test is set to it.
    dataset = ImageDataset(
        config.data.init_args,
        lambda width, height, area, references: family.size(width, height, AREA, references),
        family.side_multiple,
        family.max_references,
        scaled=lambda picture, size, area, references: family.scaled(picture, size, AREA, references),
        resampling=family.resampling,
        follow=family.references_follow,
    )
    rows = EncodedDataset(config, family, dataset, Path(pipe.config._name_or_path), torch.float32)
    fill(rows, rows.missing(), {"default": torch.device("cpu")}, shown=False)
    batch = collate([rows.read(0)])

    width, height = family.size(*image_size, AREA)
    embedded = family.distilled_guidance(pipe.transformer.config)
    with calls_of(pipe.transformer, first=True) as theirs:
        scale = GUIDANCE if embedded else 1.0  # one pass: guidance is not trained
        run_pipeline(family, pipe, references, width, height, guidance=scale)
    guidance = GUIDANCE if embedded else None
    noise = draw_noise(batch.target.shape[1:], [7], torch.float32, torch.device("cpu"))
    with calls_of(pipe.transformer) as ours, torch.no_grad():
        family.velocity(pipe.transformer, noise, torch.ones(1), batch, guidance)
    assert_same_calls(ours, theirs)

    own_latent = family.encode_image(pipe, dataset.fitted(picture(*image_size, seed=2), (width, height), 1, None))
    assert torch.equal(batch.target[0], own_latent)
    shape = family.latent_shape(width, height, pipe.transformer.config)
    assert batch.target.shape[1:] == shape
    names = ("hidden_states", "image_cond_hidden_states")  # references may have a stream of their own
    tokens = sum(value.shape[1] for name, value in ours[0].items() if name in names)
    each = 1 if family.name == "JoyImageEdit" else family.tokens(shape)  # that one is given pictures, not tokens
    assert tokens == (1 + len(references)) * each  # of one size with the target
    for name, tensor in batch.text.items():
        assert tensor.shape[1:] == family.text_shape(name, tensor.shape[1], pipe.transformer.config)


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_packing_is_that_of_the_pipeline(name: str) -> None:
    latents = torch.randn(1, 16, 12, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(latents), get_family(name).pipeline._pack_latents(latents, 1, 16, 12, 20))
    assert torch.equal(unpack(pack(latents), 12, 20), latents)


def test_the_target_latent_decodes_to_the_target(family: Family, pipe: DiffusionPipeline) -> None:
    """Normalisation and its inverse belong together: only the VAE stands between a picture and its decoded latent."""
    image = picture(96, 96, seed=3)
    latent = family.encode_image(pipe, image)
    decoded = np.asarray(family.decode(pipe, latent[None])[0])
    pixels = family.pixels(pipe, image)
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    expected = expected[:, :, 0] if expected.ndim == 5 else expected
    assert (
        np.abs(decoded.astype(int) - np.asarray(pipe.image_processor.postprocess(expected)[0]).astype(int)).max() <= 1
    )


def test_without_references_the_prompt_alone_decides(
    family: Family, pipe: DiffusionPipeline, predictor: Predictor
) -> None:
    drawn = predictor.predict(None, PROMPT, 2, guidance_scale=4.0, width=96, height=96, seed=7)
    if family.name == "QwenImageEditPlus":
        pytest.skip("the pipeline cannot draw without a reference")
    expected = run_pipeline(family, pipe, [], 96, 96, guidance=4.0)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(expected))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_tokens_of_a_prompt_are_told_beforehand(name: str, tiny_checkpoints: dict[str, Path]) -> None:
    """All but the words of the prompt, where the tiny processors see small pictures as the real ones do."""
    family = get_family(name)
    if not family.text_sees_references:
        assert family.text_tokens([(112, 112)]) == family.text_tokens([(224, 160)]) > 0
        return
    pipe = family.pipeline.from_pretrained(tiny_checkpoints[name])
    stream, seen = family.text_embeddings[0], [(224, 224), (448, 224)]
    lengths = [
        len(family.encode_text(pipe, "remove the hat", [Reference(picture(*size, seed=1), size)])[stream])
        for size in seen
    ]
    told = [family.text_tokens([size]) for size in seen]
    assert told[0] > family.text_tokens([])
    if name != "QwenImageEditPlus":  # shows 384 x 384 pixels of each, more than the tiny processor takes
        assert told[1] - told[0] == lengths[1] - lengths[0] > 0


@pytest.mark.parametrize("name,tokens", [("QwenImageEdit", 16), ("QwenImageEditPlus", 14 * 14), ("FluxKontext", 0)])
def test_a_reference_has_so_many_tokens_of_text(name: str, tokens: int) -> None:
    family = get_family(name)
    assert family.text_tokens([(112, 112)]) - family.text_tokens([]) == tokens


def test_padding_is_masked_and_changes_nothing(family: Family, pipe: DiffusionPipeline) -> None:
    """A batch of two rows whose texts differ in length predicts what each row predicts alone, with references of unlike
    sizes where the family takes several."""
    generator = torch.Generator().manual_seed(0)
    shape = family.latent_shape(96, 96, pipe.transformer.config)
    rows = []
    for place, prompt in enumerate(("remove the hat", "make the background red and keep everything else as it is")):
        sizes = [(96, 96), (64, 128)][: family.max_references]
        references = [Reference(picture(*size, seed=10 * place + number), size) for number, size in enumerate(sizes)]
        rows.append(
            Encoded(
                key=prompt,
                target=torch.randn(shape, generator=generator),
                references=tuple(family.encode_image(pipe, one.picture) for one in references),
                text=family.encode_text(pipe, prompt, references),
            )
        )
    both = collate(rows)
    noisy, timestep = torch.randn(2, *shape, generator=generator), torch.tensor([0.3, 0.8])
    guidance = 1.0 if family.distilled_guidance(pipe.transformer.config) else None
    with torch.no_grad():
        together = family.velocity(pipe.transformer, noisy, timestep, both, guidance)
        for place, row in enumerate(rows):
            one = slice(place, place + 1)
            alone = family.velocity(pipe.transformer, noisy[one], timestep[one], collate([row]), guidance)
            assert torch.allclose(together[one], alone, atol=2e-5)
    lengths = {stream: [len(row.text[stream]) for row in rows] for stream in family.text_embeddings}
    padded = {stream: counts for stream, counts in lengths.items() if len(set(counts)) > 1}
    assert {stream: mask.sum(dim=1).tolist() for stream, mask in both.text_masks.items()} == padded


@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name != "FluxKontext"])  # its pipeline knows one
def test_several_references_equal_the_pipeline(name: str, tiny_checkpoints: dict[str, Path]) -> None:
    """As many as the model takes, of unlike sizes and ratios."""
    family = get_family(name)
    if family.max_references < 2:
        pytest.skip("it takes no second reference")
    pipe = family.pipeline.from_pretrained(tiny_checkpoints[name])
    pipe.set_progress_bar_config(disable=True)
    predictor = Predictor(family, pipe, pipe.transformer, loading.load_scheduler(tiny_checkpoints[name]), AREA)
    sizes = itertools.cycle([(128, 96), (90, 200), (231, 97), (64, 64), (75, 111), (333, 180)])
    images = [picture(*next(sizes), seed=seed) for seed in range(1, family.max_references + 1)]
    with calls_of(pipe.transformer) as theirs:
        expected = run_pipeline(family, pipe, images, 64, 160)
    with calls_of(pipe.transformer) as ours:
        drawn = predictor.predict(images, PROMPT, 2, guidance_scale=GUIDANCE, width=64, height=160, seed=7)
    assert_same_calls(ours, theirs)
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(expected))


def encode_once(vae: Any) -> None:
    """Pixels equal to the bit have one latent: a megapixel, which takes seconds, is encoded once."""
    encode, known = vae.encode, list[tuple[torch.Tensor, Any]]()

    def remembering(pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for before, latent in known:
            if torch.equal(before, pixels):
                return latent
        known.append((pixels, encode(pixels, *args, **kwargs)))
        return known[-1][1]

    vae.encode = remembering


@pytest.mark.parametrize("name", ["FluxKontext", "LongCatImageEdit", "QwenImageEdit", "QwenImageEditPlus"])
def test_at_the_models_own_areas(name: str, tiny_checkpoints: dict[str, Path]) -> None:
    """A megapixel for picture and reference, 384 x 384 for the language model of Plus: no size is replaced here.

    Kontext's pipeline draws 1024 x 1024 whatever the reference is, and scales a size that is asked for to `max_area`: a
    picture of another size is had by saying both.
    """
    family = get_family(name)
    pipe = family.pipeline.from_pretrained(tiny_checkpoints[name])
    pipe.set_progress_bar_config(disable=True)
    encode_once(pipe.vae)
    predictor = Predictor(family, pipe, pipe.transformer, loading.load_scheduler(tiny_checkpoints[name]))
    image = picture(333, 777)
    embedded = family.distilled_guidance(pipe.transformer.config)
    options: dict[str, Any] = {"true_cfg_scale": GUIDANCE, "negative_prompt": " "}
    if embedded:
        width, height = family.size(*image.size)
        options = {"guidance_scale": GUIDANCE, "width": width, "height": height, "max_area": width * height}
        options["max_sequence_length"] = pipe.tokenizer_2.model_max_length
    elif name == "LongCatImageEdit":
        options = {"guidance_scale": GUIDANCE}
        pipe.tokenizer_max_length = pipe.tokenizer.model_max_length  # of the full-size checkpoint: its own, 512

    with calls_of(pipe.transformer, first=True) as theirs:
        pipe(image=image, prompt=PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(7), **options)
    with calls_of(pipe.transformer, first=True) as ours:
        predictor.predict(image, PROMPT, 2, guidance_scale=GUIDANCE, seed=7)
    assert_same_calls(ours, theirs)
    assert ours[0]["hidden_states"].shape[1] > 2 * 3800  # tokens of both


def test_position_ids_of_several_references_never_overlap() -> None:
    ids = torch.cat([image_ids(index, torch.zeros(1, 16, 4 + 2 * index, 6)) for index in range(4)])
    assert len(torch.unique(ids, dim=0)) == len(ids)
