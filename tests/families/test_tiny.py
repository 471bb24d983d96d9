"""The tiny checkpoints: real layout, same bytes each time, every input reaches the output."""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    DiffusionPipeline,
    FluxKontextPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
)
from PIL import Image

from qwen_image_finetune.drawing.predict import Conditions, Predictor
from qwen_image_finetune.families import FAMILIES, get_family, tiny
from qwen_image_finetune.families.base import Family, Reference
from qwen_image_finetune.families.tiny_tokenizers import (
    QWEN_SPECIAL_TOKENS,
    clip_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
)
from qwen_image_finetune.loading import pipeline_config
from qwen_image_finetune.records import Batch, collate
from tests.kin import EDITING

WIDTH, HEIGHT = 128, 96
KONTEXT = get_family("FluxKontext")


@pytest.fixture(scope="module", params=EDITING)
def family(request: pytest.FixtureRequest) -> Family:
    return get_family(request.param)


@pytest.fixture(scope="module")
def checkpoint(family: Family, tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints[family.name]


@pytest.fixture(scope="module")
def pipe(family: Family, checkpoint: Path) -> DiffusionPipeline:
    return family.pipeline.from_pretrained(checkpoint)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def picture(seed: int) -> Image.Image:
    """Coloured blocks of 32 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 32, WIDTH // 32, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)


def predictor_of(family: Family, pipe: DiffusionPipeline) -> Predictor:
    return Predictor(family, pipe, pipe.transformer, pipe.scheduler, WIDTH * HEIGHT)


def batch_of(family: Family, pipe: DiffusionPipeline, prompt: str, seed: int) -> Batch:
    """What the transformer gets for a prompt and a picture; from the prompt alone where the family sees none."""
    pictures = [picture(seed)][: family.max_references]
    return collate([predictor_of(family, pipe).encode(prompt, pictures, (WIDTH, HEIGHT))])


def sample(family: Family, pipe: DiffusionPipeline, prompt: str = "draw the mask", seed: int = 0) -> torch.Tensor:
    """Latents after two steps, drawn as the pipeline draws (test_conditioning compares them to the bit)."""
    predictor = predictor_of(family, pipe)
    conditions = Conditions(batch_of(family, pipe, prompt, seed), batch_of(family, pipe, family.negative_prompt, seed))
    return predictor.sample(conditions, predictor.guidance(4.0), [0], 2)


@pytest.fixture(scope="module")
def latents(family: Family, pipe: DiffusionPipeline) -> torch.Tensor:
    return sample(family, pipe)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference as a share of that of `one`."""
    return float((one - other).square().mean().sqrt() / one.square().mean().sqrt())


# Files


# The server that this is forked from is an interpreter of its own: its hashes are others.
ANOTHER = """
import sys, pathlib, torch
from qwen_image_finetune.families import FAMILIES, get_family
print(hash("a word"))
torch.set_num_threads(2)
torch.manual_seed(123)
for family in map(get_family, FAMILIES):
    family.tiny(pathlib.Path(sys.argv[1]) / family.name)
"""


def test_another_process_writes_the_same_bytes(tiny_checkpoints: dict[str, Path], tmp_path: Path, warm: Path) -> None:
    """Hash tables and thread counts differ between processes; neither may reach the files. Nor does any other test."""
    (tmp_path / "another.py").write_text(ANOTHER)
    command = [warm / "python", tmp_path / "another.py", tmp_path / "there"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parents[2])}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) != hash("a word")
    for name in FAMILIES:
        here = digests(tiny_checkpoints[name])
        assert sum(file.endswith(".safetensors") for file in here) >= 3  # transformer, text encoder, VAE
        assert digests(tmp_path / "there" / name) == here


def test_a_complete_checkpoint_is_left_alone(family: Family, checkpoint: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in checkpoint.rglob("*")}
    family.tiny(checkpoint)
    assert {file: file.stat().st_mtime_ns for file in checkpoint.rglob("*")} == before


def test_an_older_version_is_replaced(flux_folder: Path, tmp_path: Path) -> None:
    """And the global random state stays."""
    folder = Path(shutil.copytree(flux_folder, tmp_path / "checkpoint"))
    marker = json.loads((folder / tiny.MARKER).read_text())
    (folder / tiny.MARKER).write_text(json.dumps({**marker, "version": tiny.VERSION - 1}))
    (folder / "left_over").touch()
    before = torch.random.get_rng_state()
    KONTEXT.tiny(folder)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert json.loads((folder / tiny.MARKER).read_text())["version"] == tiny.VERSION
    assert not (folder / "left_over").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileExistsError, match="no tiny checkpoint"):
        KONTEXT.tiny(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model_index.json"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(FluxKontextPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        KONTEXT.tiny(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_size(checkpoint: Path, pipe: DiffusionPipeline) -> None:
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert 1e6 < sum(parameter.numel() for model in models for parameter in model.parameters()) < 3e6
    assert sum(file.stat().st_size for file in checkpoint.rglob("*")) < 12e6


# Layout


def test_every_weight_is_loaded(checkpoint: Path) -> None:
    """Nothing missing, nothing left over, and what comes out is what lies in the files."""
    index = pipeline_config(checkpoint)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        if name not in index:
            continue
        library, class_name = index[name][:2]
        _, report = getattr(sys.modules[library], class_name).from_pretrained(
            checkpoint / name, output_loading_info=True
        )
        assert not any(report.values()), (name, report)


def test_kontext_components(flux_folder: Path) -> None:
    index = json.loads((flux_folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxKontextPipeline"
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["tokenizer_2"][1] in ("T5Tokenizer", "T5TokenizerFast")
    pipe = FluxKontextPipeline.from_pretrained(flux_folder)
    assert pipe.tokenizer_max_length == 77
    assert pipe.tokenizer_2.model_max_length == 64
    assert pipe.transformer.config.guidance_embeds
    assert (pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor) == (0.1159, 0.3611)


def test_qwen_components(tiny_checkpoints: dict[str, Path]) -> None:
    pipe = QwenImageEditPlusPipeline.from_pretrained(tiny_checkpoints["QwenImageEditPlus"])
    assert isinstance(pipe.processor, transformers.Qwen2VLProcessor)
    assert isinstance(pipe.text_encoder, transformers.Qwen2_5_VLForConditionalGeneration)
    assert pipe.transformer.config.zero_cond_t
    assert pipe.scheduler.config.shift_terminal == 0.02
    tokens = pipe.processor(text="<|image_pad|>", images=picture(0).resize((2000, 1000)), return_tensors="pt")
    assert (tokens.input_ids == pipe.text_encoder.config.image_token_id).sum() <= 128


def test_qwen_template_lengths() -> None:
    """The pipelines cut a fixed number of tokens off the front; what follows must be the part they want."""
    tokenizer = qwen_tokenizer()
    template = re.search(r'prompt_template_encode = "(.*)"', inspect.getsource(QwenImageEditPipeline.__init__))
    assert template is not None
    tokens = tokenizer.tokenize(template.group(1).replace("\\n", "\n").format("draw"))
    assert tokens[64:68] == ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "draw"]
    template = re.search(r'prompt_template_encode = "(.*)"', inspect.getsource(QwenImagePipeline.__init__))
    assert template is not None
    tokens = tokenizer.tokenize(template.group(1).replace("\\n", "\n").format("draw"))
    assert tokens[34] == "draw"


def test_qwen_special_tokens_are_in_order() -> None:
    ids = qwen_tokenizer().convert_tokens_to_ids(list(QWEN_SPECIAL_TOKENS))
    assert ids == list(range(ids[0], ids[0] + 14))


@pytest.fixture(scope="module")
def built() -> list[transformers.PreTrainedTokenizerBase]:
    return [build() for build in (clip_tokenizer, t5_tokenizer, qwen_tokenizer)]


@pytest.mark.parametrize("text", ["Größe: 12 pixels!", "a café, 日本", "<draw> it's  here"])
def test_tokenizers_survive_the_disk(
    pipe: DiffusionPipeline, built: list[transformers.PreTrainedTokenizerBase], text: str
) -> None:
    """Any text can be written; the loaded Qwen tokenizer gives it back unchanged."""
    parts = [getattr(part, "tokenizer", part) for part in pipe.components.values()]  # of processors, theirs
    loaded = [part for part in parts if isinstance(part, transformers.PreTrainedTokenizerBase)]
    assert loaded
    for tokenizer in loaded:
        ids = tokenizer(text).input_ids
        same = [one for one in built if type(one) is type(tokenizer)]
        assert all(ids == one(text).input_ids for one in same)
        assert same or tokenizer.decode(ids) == text
        if isinstance(tokenizer, transformers.CLIPTokenizer):
            assert tokenizer.unk_token_id not in ids[1:-1]
        if isinstance(tokenizer, transformers.Qwen2Tokenizer):
            assert tokenizer.decode(ids) == text


# Behaviour


def test_sampling_is_finite_and_repeatable(family: Family, pipe: DiffusionPipeline, latents: torch.Tensor) -> None:
    assert 0.3 < latents.std() < 5
    assert torch.equal(latents, sample(family, pipe))


def test_decoded_pictures_use_the_range(family: Family, pipe: DiffusionPipeline, latents: torch.Tensor) -> None:
    pixels = np.asarray(family.decode(pipe, latents)[0].convert("RGB"))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.std() > 30
    assert ((pixels == 0) | (pixels == 255)).mean() < 0.5


def test_prompt_and_reference_reach_the_latents(family: Family, pipe: DiffusionPipeline, latents: torch.Tensor) -> None:
    assert difference(latents, sample(family, pipe, prompt="remove the hat")) > 0.05
    if family.max_references:
        assert difference(latents, sample(family, pipe, seed=1)) > 0.05


def test_every_input_of_the_transformer_reaches_its_output(family: Family, pipe: DiffusionPipeline) -> None:
    """What it gets for one prompt and picture, with one thing at a time exchanged for that of another."""
    given, other = batch_of(family, pipe, "draw the mask", 0), batch_of(family, pipe, "remove the hat", 1)
    noisy = torch.randn(given.target.shape, generator=torch.Generator().manual_seed(0))
    embedded = family.distilled_guidance(pipe.transformer.config)

    def velocity(batch: Batch, sigma: float = 0.8, guidance: float = 3.5) -> torch.Tensor:
        with torch.no_grad():
            timestep, scale = torch.tensor([sigma]), guidance if embedded else None
            return family.velocity(pipe.transformer, noisy, timestep, batch, scale)

    expected = velocity(given)
    assert 0.3 < expected.std() < 5
    changed = {"timestep": velocity(given, sigma=0.4)}
    changed |= {  # integers say where tokens stand, the same for both
        name: velocity(replace(given, text={**given.text, name: other.text[name]}))
        for name in family.text_embeddings
        if given.text[name].is_floating_point()
    }
    if family.max_references:
        changed["references"] = velocity(replace(given, references=other.references))
    if embedded:
        changed["guidance"] = velocity(given, guidance=1.0)
    for name, text in given.text.items():
        if given.text[name].shape != other.text[name].shape:  # of any length, so padded in batches, and masked there
            mask = (torch.arange(text.shape[1]) < text.shape[1] * 4 // 5).long()[None]
            changed[f"mask of {name}"] = velocity(replace(given, text_masks={name: mask}))
    for name, result in changed.items():
        assert difference(expected, result) > 0.03, name


def test_the_picture_reaches_the_text_embeddings(family: Family, pipe: DiffusionPipeline) -> None:
    if not family.text_sees_references:
        pytest.skip("its text encoders see no pictures")
    one, other = (
        family.encode_text(pipe, "draw", [Reference(picture(seed), (WIDTH, HEIGHT))])[family.text_embeddings[0]]
        for seed in (0, 1)
    )
    assert difference(one[-5:], other[-5:]) > 0.01  # tokens after the picture's own
