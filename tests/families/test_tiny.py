"""The tiny checkpoints: real layout, same bytes each time, every input reaches the output."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
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
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from qwen_image_finetune.families import FAMILIES, get_family, tiny
from qwen_image_finetune.families.tiny_tokenizers import (
    QWEN_SPECIAL_TOKENS,
    clip_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
)

WIDTH, HEIGHT = 128, 96
KONTEXT = get_family("FluxKontext")


WRITERS: dict[type[DiffusionPipeline], Callable[[Path], None]] = {
    get_family(name).pipeline: get_family(name).tiny for name in FAMILIES
}


@pytest.fixture(scope="module", params=WRITERS, ids=lambda cls: cls.__name__)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / request.param.__name__
    WRITERS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint: Path) -> DiffusionPipeline:
    pipe = getattr(diffusers, checkpoint.name).from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Qwen pipelines see references at 128 x 96 instead of a megapixel."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        original = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda _, ratio, original=original: original(WIDTH * HEIGHT, ratio)
        )


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def picture(seed: int) -> Image.Image:
    """Coloured blocks of 32 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 32, WIDTH // 32, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)


def sample(pipe: DiffusionPipeline, prompt: str = "draw the mask", seed: int = 0, **changes: Any) -> torch.Tensor:
    """Latents after two steps."""
    arguments: dict[str, Any] = {
        "image": picture(seed),
        "prompt": prompt,
        "width": WIDTH,
        "height": HEIGHT,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    if isinstance(pipe, FluxKontextPipeline):
        arguments |= {"_auto_resize": False, "max_area": WIDTH * HEIGHT}
    else:
        arguments |= {"true_cfg_scale": 4.0, "negative_prompt": " "}
    latents: torch.Tensor = pipe(**(arguments | changes)).images
    return latents


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference as a share of that of `one`."""
    return float((one - other).square().mean().sqrt() / one.square().mean().sqrt())


# Files


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Hash tables and thread counts differ between processes; neither may reach the files."""
    script = (
        "import sys, pathlib, torch\n"
        "from qwen_image_finetune.families import FAMILIES, get_family\n"
        "torch.manual_seed(123)\n"
        "for family in map(get_family, FAMILIES):\n"
        "    family.tiny(pathlib.Path(sys.argv[1]) / family.pipeline.__name__)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    environment["PYTHONPATH"] = str(Path(tiny.__file__).parents[2])
    subprocess.run([sys.executable, "-c", script, tmp_path / "there"], check=True, env=environment)
    for cls, write in WRITERS.items():
        write(tmp_path / "here" / cls.__name__)
    here = digests(tmp_path / "here")
    assert sum(name.endswith(".safetensors") for name in here) == 10
    assert digests(tmp_path / "there") == here


def test_the_global_random_state_stays(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    KONTEXT.tiny(tmp_path / "checkpoint")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_complete_checkpoint_is_left_alone(checkpoint: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in checkpoint.rglob("*")}
    WRITERS[getattr(diffusers, checkpoint.name)](checkpoint)
    assert {file: file.stat().st_mtime_ns for file in checkpoint.rglob("*")} == before


def test_an_older_version_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    monkeypatch.setattr(tiny, "VERSION", tiny.VERSION - 1)
    KONTEXT.tiny(folder)
    (folder / "left_over").touch()
    monkeypatch.undo()
    KONTEXT.tiny(folder)
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
    index = json.loads((checkpoint / "model_index.json").read_text())
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        if name not in index:
            continue
        library, class_name = index[name]
        _, report = getattr(sys.modules[library], class_name).from_pretrained(
            checkpoint / name, output_loading_info=True
        )
        assert not any(report.values()), (name, report)


def test_kontext_components(tmp_path: Path) -> None:
    KONTEXT.tiny(tmp_path / "checkpoint")
    index = json.loads((tmp_path / "checkpoint" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxKontextPipeline"
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["tokenizer_2"][1] in ("T5Tokenizer", "T5TokenizerFast")
    pipe = FluxKontextPipeline.from_pretrained(tmp_path / "checkpoint")
    assert pipe.tokenizer_max_length == 77
    assert pipe.tokenizer_2.model_max_length == 64
    assert pipe.transformer.config.guidance_embeds
    assert (pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor) == (0.1159, 0.3611)


def test_qwen_components(tmp_path: Path) -> None:
    get_family("QwenImageEditPlus").tiny(tmp_path / "checkpoint")
    pipe = QwenImageEditPlusPipeline.from_pretrained(tmp_path / "checkpoint")
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


@pytest.mark.parametrize("text", ["Größe: 12 pixels!", "a café, 日本", "<draw> it's  here"])
def test_tokenizers_survive_the_disk(pipe: DiffusionPipeline, text: str) -> None:
    """Any text can be written; the loaded Qwen tokenizer gives it back unchanged."""
    if isinstance(pipe, FluxKontextPipeline):
        assert pipe.tokenizer(text).input_ids == clip_tokenizer()(text).input_ids
        assert pipe.tokenizer_2(text).input_ids == t5_tokenizer()(text).input_ids
        assert pipe.tokenizer.unk_token_id not in pipe.tokenizer(text).input_ids[1:-1]
    else:
        assert pipe.tokenizer(text).input_ids == qwen_tokenizer()(text).input_ids
        assert pipe.tokenizer.decode(pipe.tokenizer(text).input_ids) == text


# Behaviour


def test_sampling_is_finite_and_repeatable(pipe: DiffusionPipeline) -> None:
    latents = sample(pipe)
    assert 0.3 < latents.std() < 5
    assert torch.equal(latents, sample(pipe))


def test_decoded_pictures_use_the_range(pipe: DiffusionPipeline) -> None:
    pixels = np.asarray(sample(pipe, output_type="pil")[0])
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.std() > 30
    assert ((pixels == 0) | (pixels == 255)).mean() < 0.5


def test_prompt_and_reference_reach_the_latents(pipe: DiffusionPipeline) -> None:
    latents = sample(pipe)
    assert difference(latents, sample(pipe, prompt="remove the hat")) > 0.05
    assert difference(latents, sample(pipe, seed=1)) > 0.05


def test_every_input_of_the_transformer_reaches_its_output(pipe: DiffusionPipeline) -> None:
    """Inputs are caught on their way from a pipeline, then exchanged one at a time."""
    caught: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs), with_kwargs=True
    )
    sample(pipe)
    sample(pipe, prompt="remove the hat", seed=1)
    hook.remove()
    given, other = caught[0], caught[len(caught) // 2]
    target = (HEIGHT // 16) * (WIDTH // 16)
    mixed = torch.cat([given["hidden_states"][:, :target], other["hidden_states"][:, target:]], dim=1)
    changes: list[dict[str, Any]] = [{"hidden_states": mixed}, {"timestep": given["timestep"] * 0.5}]
    if isinstance(pipe, FluxKontextPipeline):
        changes += [{name: other[name]} for name in ("encoder_hidden_states", "pooled_projections")]
        changes += [{"guidance": given["guidance"] * 0 + 1}]
    else:
        names = ("encoder_hidden_states", "encoder_hidden_states_mask")
        changes += [{name: other[name] for name in names}]
    with torch.no_grad():
        velocity = pipe.transformer(**given)[0][:, :target]
        assert 0.3 < velocity.std() < 5
        for change in changes:
            share = difference(velocity, pipe.transformer(**(given | change))[0][:, :target])
            assert share > 0.03, (list(change), share)


def test_the_picture_reaches_the_text_embeddings(pipe: DiffusionPipeline) -> None:
    if isinstance(pipe, FluxKontextPipeline):
        pytest.skip("its text encoders see no pictures")
    with torch.no_grad():
        one, other = (pipe.encode_prompt(prompt="draw", image=picture(seed))[0] for seed in (0, 1))
    assert difference(one[:, -5:], other[:, -5:]) > 0.01  # tokens after the picture's own
