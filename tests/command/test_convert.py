"""`qif convert`: projects of five other trainers; every key is answered for, and our reader finds the same pairs."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from qwen_image_finetune import loading
from qwen_image_finetune.command.cli import main
from qwen_image_finetune.command.convert import terms
from qwen_image_finetune.config import load_config
from qwen_image_finetune.config.classes import import_class
from qwen_image_finetune.data.sources import read_folder
from qwen_image_finetune.families import get_family
from qwen_image_finetune.lora.targets import target_modules
from qwen_image_finetune.studio import form
from qwen_image_finetune.training.optim import build_optimizer

Project = tuple[str, dict[str, Any]]  # the file to convert, and what ours must say, by dotted key

AI_TOOLKIT = """
job: extension
config:
  name: smile
  process:
    - type: sd_trainer
      training_folder: runs
      trigger_word: p3r5on
      network: {type: lora, linear: 32}
      save: {dtype: float16, save_every: 250, push_to_hub: false}
      datasets:
        - folder_path: targets
          control_path: [first, second]
          caption_ext: caption
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: 768
      train: {batch_size: 2, steps: 300, lr: 2e-4, optimizer: adamw8bit, timestep_type: sigmoid, dtype: bf16,
              noise_scheduler: flowmatch, optimizer_params: {weight_decay: 0.01}, free_u: true}
      model: {name_or_path: Qwen/Qwen-Image-Edit-2509, arch: qwen_image_edit_plus, quantize: true, low_vram: true,
              qtype: "uint4|some/adapter.safetensors"}
      sample:
        sample_every: 100
        walk_seed: true
        seed: 7
        samples:
          - {prompt: "a smile", ctrl_img_1: a.png, ctrl_img_2: b.png}
          - {prompt: "a frown --d 3", ctrl_img: a.png, width: 512}
meta: {version: "1.0"}
"""
MUSUBI = """
accelerate launch --num_cpu_threads_per_process 1 src/musubi_tuner/qwen_image_train_network.py \\
  --dit nowhere.safetensors --vae vae --text_encoder te --model_version edit-2511 --dataset_config sets.toml --sdpa \\
  --mixed_precision bf16 --fp8_base --fp8_scaled --blocks_to_swap 20 --timestep_sampling shift \\
  --discrete_flow_shift 2.2 --optimizer_type adamw8bit --optimizer_args "weight_decay=0.01" "betas=(0.9,0.99)" \\
  --learning_rate 5e-5 --gradient_checkpointing --network_module networks.lora_qwen_image --network_dim 32 \\
  --max_train_epochs 16 --save_every_n_epochs 1 --base_weights one.safetensors --unheard_of
"""
MUSUBI_SETS = """
[general]
resolution = [832, 576]
caption_extension = ".caption"
batch_size = 2

[[datasets]]
image_directory = "targets"
control_directory = "numbered"
cache_directory = "theirs"
num_repeats = 3
"""
SIMPLETUNER = {
    "model_family": "flux", "model_flavour": "kontext", "model_type": "lora", "--lora_rank": 32,
    "data_backend_config": "multidatabackend.json", "learning_rate": 1e-5, "max_train_steps": 100,
    "num_train_epochs": 0, "base_model_precision": "int8-quanto", "optimizer": "adamw_bf16", "validation_steps": 50,
    "flow_schedule_shift": 1.73, "caption_dropout_probability": 0.1, "use_ema": False, "hub_model_id": "mine",
    "report_to": "none", "crepa_lambda": 0.5,
}  # fmt: skip
SIMPLETUNER_SETS = [
    {"id": "edited", "type": "local", "instance_data_dir": "targets", "conditioning_data": ["references"],
     "caption_strategy": "textfile", "resolution": 512, "cache_dir_vae": "vae"},
    {"id": "references", "dataset_type": "conditioning", "type": "local", "instance_data_dir": "first"},
    {"id": "texts", "dataset_type": "text_embeds", "type": "local", "cache_dir": "text"},
]  # fmt: skip
ONETRAINER = {
    "model_type": "FLUX_2", "base_model_name": "black-forest-labs/FLUX.2-klein-base-4B", "training_method": "LORA",
    "concept_file_name": "concepts.json", "learning_rate": 3e-5, "batch_size": 2, "lora_rank": 32, "lora_alpha": 8.0,
    "resolution": "640", "transformer": {"train": True, "weight_dtype": "NFLOAT_4", "model_name": ""},
    "gradient_checkpointing": "CPU_OFFLOADED", "masked_training": True, "custom_conditioning_image": True,
    "optimizer": {"optimizer": "ADAMW_8BIT", "beta1": 0.9, "beta2": 0.99, "fused": False, "stochastic_rounding": True},
    "timestep_distribution": "LOGIT_NORMAL", "dynamic_timestep_shifting": True, "save_every": 100,
    "save_every_unit": "STEP", "sample_after": 10, "sample_after_unit": "MINUTE", "train_dtype": "BFLOAT_16",
}  # fmt: skip
CONCEPTS = [
    {"name": "faces", "path": "labelled", "enabled": True, "include_subdirectories": True,
     "image": {"enable_random_flip": True, "enable_random_hue": True, "random_hue_max_strength": 0.2},
     "text": {"prompt_source": "sample"}},
    {"name": "held out", "path": "elsewhere", "type": "VALIDATION"},
]  # fmt: skip
QFLUX = """
trainer: FluxKontext
resume: null
model:
  pretrained_model_name_or_path: black-forest-labs/FLUX.1-Kontext-dev
  quantize: true
  lora: {r: 32, lora_alpha: 16, init_lora_weights: gaussian, target_modules: [to_k, to_q]}
data:
  class_path: qflux.data.dataset.ImageDataset
  init_args:
    dataset_path: qflux
    caption_dropout_rate: 0.1
    use_edit_mask: true
    selected_control_indexes: [1]
    processor:
      class_path: qflux.data.preprocess.ImageProcessor
      init_args: {process_type: center_crop, target_size: [832, 576], controls_size: [[832, 576]]}
  batch_size: 8
logging: {output_dir: out, sampling: {enable: true, validation_steps: 50, num_samples: 2, seed: 1,
          validation_data: [{control: a.png, prompt: "a hat"}]}, tags: [x]}
optimizer: {class_path: bitsandbytes.optim.Adam8bit, init_args: {lr: 0.0001}}
loss: {mask_loss: true, forground_weight: 3.0, class_path: qflux.losses.X}
train: {max_train_steps: 100, num_epochs: 2, gradient_accumulation_steps: 1, fit_device: {vae_encoder: "cpu"}}
cache: {cache_dir: "${logging.output_dir}/cache", use_cache: true, prompt_empty_drop_keys: [prompt_embed],
        devices: {text_encoder: "cpu"}}
predict: {devices: {dit: "cpu"}}
"""


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), (shade, 90, 255 - shade)).save(path)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pairs, one in a nested folder, as each of the five trainers keeps them."""
    monkeypatch.chdir(tmp_path)
    for number, stem in enumerate(("a", "b")):
        home = Path("targets", "more" if stem == "b" else "")
        picture(home / f"{stem}.png", number)
        (home / f"{stem}.caption").write_text(f"make [trigger] {stem}\n")
        (home / f"{stem}.txt").write_text(f"make {stem}\n")
        picture(Path("first", f"{stem}.jpg"), 40 + number)
        picture(Path("first", "more" if stem == "b" else "", f"{stem}.png"), 40 + number)
        picture(Path("second", f"{stem}.webp"), 80 + number)
        for place in (0, 1):
            picture(Path("numbered", f"{stem}_{place}.png"), 120 + 10 * place + number)
        labelled = Path("labelled", "deep" if stem == "b" else "")
        picture(labelled / f"{stem}.png", number)
        picture(labelled / f"{stem}-condlabel.png", 160 + number)
        picture(labelled / f"{stem}-masklabel.png", 200 + number)
        (labelled / f"{stem}.txt").write_text(f"make {stem}")
        picture(Path("qflux/target_images", f"{stem}.png"), number)
        picture(Path("qflux/control", f"{stem}.png"), 40 + number)
        picture(Path("qflux/control", f"{stem}_control_1.png"), 80 + number)
        picture(Path("qflux/control", f"{stem}_mask.png"), 200 + number)
        Path("qflux/control", f"{stem}.txt").write_text(f"make {stem}")
    Path("ai.yaml").write_text(AI_TOOLKIT)
    Path("train.sh").write_text(MUSUBI)
    Path("sets.toml").write_text(MUSUBI_SETS)
    Path("config.json").write_text(json.dumps(SIMPLETUNER))
    Path("multidatabackend.json").write_text(json.dumps(SIMPLETUNER_SETS))
    Path("one.json").write_text(json.dumps(ONETRAINER))
    Path("concepts.json").write_text(json.dumps(CONCEPTS))
    Path("qflux.yaml").write_text(QFLUX)
    return tmp_path


def leaves(tree: Any, key: str = "") -> Iterator[str]:
    """Dotted names of everything that a person wrote: the slow way, of plain values."""
    if isinstance(tree, dict):
        for name, inner in tree.items():
            yield from leaves(inner, f"{key}.{str(name).lstrip('-')}".lstrip("."))
    elif isinstance(tree, list) and any(isinstance(each, dict) for each in tree):
        for place, inner in enumerate(tree):
            yield from leaves(inner, f"{key}[{place}]")
    else:
        yield key


def theirs(file: str) -> set[str]:
    if file == "train.sh":
        options = {word.removeprefix("--") for word in MUSUBI.partition(".py")[2].split() if word.startswith("--")}
        return options | {f"data.{key}" for key in leaves(tomllib.loads(MUSUBI_SETS))}
    tree = yaml.safe_load(Path(file).read_text())
    beside = {"config.json": ("data", SIMPLETUNER_SETS), "one.json": ("concepts", CONCEPTS)}
    return set(leaves(tree)) | (set(leaves(*reversed(beside[file]))) if file in beside else set())


def converted(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["convert", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


PROJECTS: dict[str, Project] = {
    "ai-toolkit": ("ai.yaml", {
        "model.pretrained_model_name_or_path": "Qwen/Qwen-Image-Edit-2509", "train.trainer": "QwenImageEditPlus",
        "model.quantize": "nf4", "train.memory": "auto", "model.lora.r": 32, "model.lora.lora_alpha": 1.0,
        "train.max_train_steps": 300, "optimizer.init_args": {"lr": 2e-4, "weight_decay": 0.01},
        "optimizer.class_path": "bitsandbytes.optim.AdamW8bit", "data.batch_size": 2,
        "train.gradient_checkpointing": True, "data.init_args.caption_dropout_rate": 0.05,
        "data.init_args.resolution": 768, "cache.use_cache": True, "train.checkpointing_steps": 250,
        "train.checkpoints_total_limit": 5, "logging.output_dir": "runs", "validation.steps": 100,
        "logging.tracker_project_name": "smile",
    }),
    "musubi-tuner": ("train.sh", {
        "model.pretrained_model_name_or_path": "Qwen/Qwen-Image-Edit-2511", "model.quantize": "fp8",
        "model.lora.r": 32, "model.lora.lora_alpha": 1.0, "train.blocks_to_swap": 20, "train.num_epochs": 16,
        "train.max_train_steps": None, "train.sigma_shift": 2.2, "data.batch_size": 2,
        "data.init_args.image_size": [832, 576],
        "optimizer.init_args": {"lr": 5e-5, "weight_decay": 0.01, "betas": [0.9, 0.99]},
    }),
    "SimpleTuner": ("config.json", {
        "model.pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Kontext-dev", "model.quantize": "int8",
        "model.lora.r": 32, "model.lora.lora_alpha": 32, "train.max_train_steps": 100, "train.num_epochs": None,
        "train.sigma_shift": 1.73, "data.init_args.caption_dropout_rate": 0.1, "data.init_args.resolution": 512,
        "validation.enabled": True, "validation.steps": 50, "logging.report_to": "none",
        "optimizer.class_path": "torch.optim.AdamW",
    }),
    "OneTrainer": ("one.json", {
        "model.pretrained_model_name_or_path": "black-forest-labs/FLUX.2-klein-base-4B", "model.quantize": "nf4",
        "model.lora.r": 32, "model.lora.lora_alpha": 8.0, "train.num_epochs": 100, "data.batch_size": 2,
        "train.gradient_checkpointing": True, "train.offload_activations": True, "loss.mask_loss": True,
        "loss.background_weight": 0.1, "data.init_args.use_edit_mask": True, "data.init_args.random_flip": True,
        "data.init_args.resolution": 640, "train.checkpointing_steps": 100, "train.sigma_shift": "model",
        "optimizer.init_args": {"lr": 3e-5, "betas": [0.9, 0.99]},
    }),
    "qflux": ("qflux.yaml", {
        "train.trainer": "FluxKontext", "model.quantize": True, "model.lora.r": 32, "model.lora.lora_alpha": 16,
        "data.init_args.image_size": [832, 576], "loss.foreground_weight": 3.0, "cache.cache_dir": "out/cache",
        "cache.text_encoder_device": "cpu", "predict.devices.transformer": "cpu", "validation.enabled": True,
        "cache.prompt_empty_drop_keys": ["prompt_embeds"], "train.gradient_checkpointing": True,
    }),
}  # fmt: skip
PROMPTS = {"ai-toolkit": ["make p3r5on a", "make p3r5on b"], "musubi-tuner": ["make [trigger] a"]}
UNKNOWN = {
    "ai-toolkit": "config.process[0].train.free_u", "musubi-tuner": "unheard_of", "SimpleTuner": "crepa_lambda",
    "OneTrainer": "concepts[0].image.random_hue_max_strength", "qflux": "loss.class_path",
}  # fmt: skip


@pytest.mark.parametrize("program", PROJECTS)
def test_every_key_is_answered_for(program: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, expected = PROJECTS[program]
    found = converted(capsys, file)
    assert found["program"] == program
    said = [line["theirs"].lstrip("-") for line in found["keys"]]
    assert theirs(file) <= set(said) and len(said) == len(set(said))
    config = load_config(Path("my_run.yaml"))
    assert {key: at(config, key) for key in expected} == expected
    lost = {line["theirs"] for line in found["keys"] if line["lost"]}
    assert UNKNOWN[program] in lost
    for line in found["keys"]:  # what is said to have become a key of ours is what the file says
        for key, value in line["ours"].items():
            written = at(config, key)
            assert json.loads(json.dumps(written, default=lambda section: section.model_dump())) == value or (
                key == "validation.samples"
            ), key


@pytest.mark.parametrize("program", PROJECTS)
def test_our_reader_finds_the_pairs(program: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("first/a.png").chmod(0o640)
    converted(capsys, PROJECTS[program][0], "--output", "ours/mine.yaml")
    assert Path("first/a.png").stat().st_mode & 0o777 == 0o640  # a link leaves a file as it was
    config = load_config(Path("ours/mine.yaml"))
    (entry,) = config.data.init_args.entries
    assert entry.repeats == (3 if program == "musubi-tuner" else 1)
    folder = Path(entry.path)
    assert folder.parent == Path("ours/mine_pairs")
    rows, problems = read_folder(folder, masks=config.data.init_args.use_edit_mask)
    assert problems == []
    stems = ["a"] if program == "musubi-tuner" else ["a", "b"]  # which reads no nested folders
    texts = [row.caption.read_text().strip() for row in rows if row.caption is not None]
    assert texts == PROMPTS.get(program, [f"make {stem}" for stem in stems])
    for row, stem in zip(rows, stems, strict=True):
        names = {"SimpleTuner": (f"first/more/{stem}.png" if stem == "b" else f"first/{stem}.png",),
                 "OneTrainer": (f"labelled/{'deep/' if stem == 'b' else ''}{stem}-condlabel.png",),
                 "qflux": (f"qflux/control/{stem}.png", f"qflux/control/{stem}_control_1.png")}  # fmt: skip
        for ours, source in zip(row.references, names.get(program, ()), strict=program in names):
            assert ours.samefile(source)  # a hard link: the same file, that takes no room
        if program in ("OneTrainer", "qflux"):
            assert row.mask is not None and os.stat(row.mask).st_nlink == 2
    if program in ("ai-toolkit", "musubi-tuner"):
        assert [len(row.references) for row in rows] == [2] * len(rows)
        second = "second/a.webp" if program == "ai-toolkit" else "numbered/a_1.png"
        assert rows[0].references[1].samefile(second)


def test_samples_keep_their_pictures_and_seeds(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(capsys, "ai.yaml")
    samples = load_config(Path("my_run.yaml")).validation.samples
    assert [(one.prompt, one.references, one.seed) for one in samples] == [
        ("a smile", ["a.png", "b.png"], 7), ("a frown", ["a.png"], 3),
    ]  # fmt: skip


def test_pairs_of_our_layout_are_read_where_they_are(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("images", "control"):
        Path("qflux/target_images" if name == "images" else "qflux/control").rename(f"qflux/{name}")
    Path("qflux/images").rename("qflux/training_images")
    Path("qflux/control").rename("qflux/control_images")
    for caption in Path("qflux/control_images").glob("*.txt"):
        caption.rename(Path("qflux/training_images") / caption.name)
    for mask in Path("qflux/control_images").glob("*_mask.png"):
        mask.rename(Path("qflux/training_images") / mask.name)
    found = converted(capsys, "qflux.yaml")
    assert load_config(Path("my_run.yaml")).data.init_args.dataset_path == "qflux"
    assert found["data"][-1].endswith("read where they are: qflux") and not Path("my_run_pairs").exists()


def test_what_cannot_be_paired_is_named(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("second/b.webp").unlink()
    found = converted(capsys, "ai.yaml")
    assert any("left out: 1 (targets/more/b.png)" in line for line in found["data"])
    assert main(["convert", "ai.yaml"]) == 2 and "there already" in capsys.readouterr().err
    Path("targets").rename("gone")
    assert main(["convert", "ai.yaml", "--overwrite"]) == 0
    assert "no pairs are there (targets)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.yaml", "a: 1", "is not known as a file of"),
        ("x.json", "[]", "give the configuration that names it"),
        ("x.json", '{"model_family": "sdxl", "model_flavour": "base"}', "multidatabackend.json"),
        ("x.json", "{", "is no JSON"),
        ("x.toml", "[[datasets]]\nimage_directory = 'targets'", "names no model: give it"),
        ("x.toml", "learning_rate = 1", "no dataset_config"),
        ("x.sh", "python other.py --dit x", "no command of musubi-tuner"),
        ("x.yaml", "config: {process: [{type: slider}]}", "of type 'slider'"),
        ("x.yaml", "config: {process: [{type: sd_trainer, model: {arch: wan21}}]}", "wan21 is not a model"),
        ("nowhere.yaml", None, "No such file"),
    ],
)
def test_other_files_are_refused(
    name: str, content: str | None, message: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("multidatabackend.json").unlink()
    if content is not None:
        Path(name).write_text(content)
    assert main(["convert", name]) == 2
    assert message in capsys.readouterr().err and not Path("my_run.yaml").exists()


def test_data_sets_of_the_hub(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("qflux.yaml").write_text(
        QFLUX.replace("dataset_path: qflux", "dataset_path: [{repo_id: a/b, split: test}, qflux]")
    )
    converted(capsys, "qflux.yaml")
    ours = [(entry.path, entry.split) for entry in load_config(Path("my_run.yaml")).data.init_args.entries]
    assert ours == [("my_run_pairs/target_images", "train"), ("hf://a/b", "test")]
    hub = {"id": "edited", "type": "huggingface", "dataset_name": "a/b", "conditioning_data": ["references"],
           "huggingface": {"image_column": "after", "caption_column": "words"}}  # fmt: skip
    other = {"id": "references", "type": "huggingface", "dataset_type": "conditioning", "dataset_name": "a/b",
             "huggingface": {"image_column": "before"}}  # fmt: skip
    Path("multidatabackend.json").write_text(json.dumps([hub, other]))
    converted(capsys, "config.json", "--overwrite")
    (entry,) = load_config(Path("my_run.yaml")).data.init_args.entries
    assert entry.columns is not None and entry.path == "hf://a/b"
    assert (entry.columns.target, entry.columns.references, entry.columns.prompt) == ("after", ["before"], "words")


def test_a_model_may_be_named(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(capsys, "sets.toml", "--model", "Qwen/Qwen-Image-Edit")
    assert load_config(Path("my_run.yaml")).model.pretrained_model_name_or_path == "Qwen/Qwen-Image-Edit"
    Path("options.toml").write_text('[all]\ndataset_config = "sets.toml"\nnetwork_module = "networks.lora_flux"\n')
    converted(capsys, "options.toml", "--overwrite")
    assert "Kontext" in load_config(Path("my_run.yaml")).model.pretrained_model_name_or_path


def test_optimizers_are_what_they_are_called() -> None:
    """Every class that a name stands for exists, and the names of trainers with and without strokes mean the same."""
    for path in {*terms.OPTIMIZERS.values(), *form.OPTIMIZERS}:
        assert import_class(path, "optimizer.class_path", torch.optim.Optimizer).__name__ == path.rsplit(".", 1)[1]
    assert terms.optimizer("SCHEDULE_FREE_ADAMW") == terms.optimizer("schedulefree.AdamWScheduleFree")
    assert terms.optimizer("AdEMAMix_8bit") == "bitsandbytes.optim.AdEMAMix8bit"
    assert terms.optimizer("lookahead") is None and terms.optimizer(3) is None


ADAFACTORS = {
    "ai.yaml": lambda text: text.replace("optimizer: adamw8bit", "optimizer: adafactor"),
    "train.sh": lambda text: text.replace('adamw8bit --optimizer_args "weight_decay=0.01" "betas=(0.9,0.99)"',
        'adafactor --optimizer_args "relative_step=True" "warmup_init=True" "weight_decay=0.01"'),
    "one.json": lambda text: json.dumps(json.loads(text) | {"optimizer": {
        "optimizer": "ADAFACTOR", "eps": 1e-30, "eps2": 1e-3, "scale_parameter": False, "relative_step": False,
        "warmup_init": False, "weight_decay": 0.01, "clip_threshold": 1.0, "beta1": None, "fused": False}}),
}  # fmt: skip


@pytest.mark.parametrize("file", ADAFACTORS)
def test_adafactor_takes_the_rate_as_it_stands(file: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As their programs run it. A share of a weight's size, as torch's takes, would leave an adapter at zero."""
    Path(file).write_text(ADAFACTORS[file](Path(file).read_text()))
    found = converted(capsys, file)
    config = load_config(Path("my_run.yaml"))
    arguments = config.optimizer.init_args
    assert config.optimizer.class_path == "transformers.optimization.Adafactor"
    assert (arguments["scale_parameter"], arguments["relative_step"]) == (False, False)
    assert arguments["weight_decay"] == 0.01 and "warmup_init" not in arguments
    weight = torch.nn.Parameter(torch.zeros(4, 4))  # as the second factor of an adapter begins
    optimizer = build_optimizer(config.optimizer, [weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert weight.abs().max().item() == pytest.approx(arguments["lr"], rel=0.01)
    assert not [key for key in found["keys"] if "optimizer" in key["theirs"] and key["lost"]]


def small(folder: str, number: int, caption: str = "make it") -> None:
    """So many pairs, for the trainers whose references are beside the targets or in a folder of the same names."""
    for place in range(number):
        for name in (f"{place}.png", f"{place}-condlabel.png"):
            picture(Path(folder, name), place)
        picture(Path(f"{folder}-first", f"{place}.png"), 90 + place)
        Path(folder, f"{place}.txt").write_text(caption)


def entries(capsys: pytest.CaptureFixture[str], file: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Data sets of the configuration that becomes of a project, what each has of its own, and what was said."""
    found = converted(capsys, file, "--overwrite")
    config = load_config(Path("my_run.yaml"))
    own = [entry.model_dump(exclude_defaults=True) for entry in config.data.init_args.entries]
    for entry in own:
        rows, problems = read_folder(Path(entry.pop("path")), masks=False)
        assert not problems and rows
    return own, found["data"]


def test_sets_of_simpletuner_that_differ(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions of several lines are several captions there, unless they are not to be; sizes, crops, shares."""
    small("large", 2, "a hat\n\na cap\n")
    small("little", 4, "first line\nsecond line")
    small("plain", 6)

    def sets(*own: dict[str, Any]) -> None:
        many = [{"id": name, "type": "local", "instance_data_dir": name, "caption_strategy": "textfile",
                 "conditioning_data": f"{name}-first", **more}
                for name, more in zip(("large", "little", "plain"), own, strict=True)]  # fmt: skip
        many += [{"id": f"{name}-first", "dataset_type": "conditioning", "type": "local",
                  "instance_data_dir": f"{name}-first"} for name in ("large", "little", "plain")]  # fmt: skip
        Path("multidatabackend.json").write_text(json.dumps(many))

    sets({"resolution": 1.0, "resolution_type": "area", "repeats": 2}, {"disable_multiline_split": True},
         {"resolution": 512, "crop": True, "instance_prompt": "oil,", "prepend_instance_prompt": True})  # fmt: skip
    own, said = entries(capsys, "config.json")
    assert own == [{"resolution": 1000, "repeats": 3, "prompt_per_line": True}, {},
                   {"image_size": [512, 512], "prefix": "oil, "}]  # fmt: skip
    assert any(line.startswith("repeats: 3 of data[0].instance_data_dir  ->  repeats: 3 of ") for line in said)

    # By what each has: 2 pairs three times, 4 with half the probability, 6.
    sets({"repeats": 2}, {"probability": 0.5}, {"crop": True, "crop_style": "random", "minimum_image_size": 64})
    own, said = entries(capsys, "config.json")
    assert [entry["weight"] for entry in own] == [6, 2, 6] and not any("repeats" in entry for entry in own)
    assert any("as many visits as there are pairs here, 12, 14 there" in line for line in said)
    assert any(line.startswith("random_crop: False, False, True  ->  no counterpart") for line in said)
    assert load_config(Path("my_run.yaml")).data.init_args.random_crop is False

    Path("config.json").write_text(json.dumps({**SIMPLETUNER, "data_backend_sampling": "uniform"}))
    sets({}, {"probability": 0.25}, {})
    assert [entry["weight"] for entry in entries(capsys, "config.json")[0]] == [1, 0.25, 1]


def test_concepts_of_onetrainer_that_differ(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of a text file is a caption there; balancing by repeats or samples, sizes and flips of their own."""
    small("large", 2, "a hat\na cap")
    small("little", 4)
    Path("all.txt").write_text("one\ntwo\n")

    def concepts(*own: dict[str, Any]) -> None:
        many = [{"path": name, "enabled": True, "image": {}, "text": {"prompt_source": "sample"}, **more}
                for name, more in zip(("large", "little"), own, strict=True)]  # fmt: skip
        Path("concepts.json").write_text(json.dumps(many))

    concepts({"balancing": 3.0, "image": {"enable_resolution_override": True, "resolution_override": "1024,768"}},
             {"text": {"prompt_source": "concept", "prompt_path": "all.txt"}})  # fmt: skip
    own, _ = entries(capsys, "one.json")
    assert own == [{"repeats": 3, "resolution": [1024, 768], "prompt_per_line": True},
                   {"resolution": 640, "prompt_per_line": True}]  # fmt: skip
    entry = load_config(Path("my_run.yaml")).data.init_args.entries[1]
    rows, _ = read_folder(Path(entry.path), masks=False)
    assert {row.caption.read_text() for row in rows if row.caption} == {"one\ntwo\n"}

    concepts({"balancing": 2.5, "image": {"enable_random_flip": True}},
             {"balancing": 7.0, "balancing_strategy": "SAMPLES", "loss_weight": 0.5})  # fmt: skip
    found = converted(capsys, "one.json", "--overwrite")
    config = load_config(Path("my_run.yaml"))
    assert [entry.weight for entry in config.data.init_args.entries] == [5, 7]
    assert config.data.init_args.random_flip is False
    assert any(line.startswith("random_flip: True, False  ->  no counterpart") for line in found["data"])
    assert "concepts[1].loss_weight" in {line["theirs"] for line in found["keys"] if line["lost"]}


def test_sets_of_ai_toolkit_that_differ(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = yaml.safe_load(AI_TOOLKIT)
    (first,) = project["config"]["process"][0]["datasets"]
    project["config"]["process"][0]["datasets"] = [
        {**first, "num_repeats": 2, "flip_x": True},
        {**first, "resolution": [512, 1024], "caption_dropout_rate": 0.2, "flip_x": False},
    ]
    Path("ai.yaml").write_text(yaml.safe_dump(project))
    own, said = entries(capsys, "ai.yaml")
    assert own == [{"resolution": 768, "caption_dropout_rate": 0.05, "repeats": 2},
                   {"resolution": [512, 1024], "caption_dropout_rate": 0.2}]  # fmt: skip
    assert any(line.startswith("random_flip: True, False  ->  no counterpart") for line in said)


def test_sets_of_musubi_that_differ(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A caption of several lines is one caption there."""
    small("large", 2, "a hat\na cap")
    rows = [{"image_path": "large/0.png", "control_path": "large-first/0.png", "caption": "a hat\na cap"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("sets.toml").write_text(
        MUSUBI_SETS + '\n[[datasets]]\nimage_directory = "large"\ncontrol_directory = "large-first"\n'
        'caption_extension = ".txt"\nresolution = 512\nenable_bucket = true\n\n[[datasets]]\n'
        'image_jsonl_file = "rows.jsonl"\nnum_repeats = 5\n'
    )
    own, _ = entries(capsys, "train.sh")
    assert own == [{"image_size": [832, 576], "repeats": 3}, {"resolution": 512},
                   {"image_size": [832, 576], "repeats": 5}]  # fmt: skip


def linear_layers(family: str, checkpoints: dict[str, Path]) -> Any:
    return loading.empty_transformer(get_family(family), checkpoints[family], torch.float32)


def on(config: Path, transformer: Any) -> set[str]:
    """The layers that the adapter of a configuration sits on."""
    lora = load_config(config).model.lora
    assert lora is not None
    return set(target_modules(transformer, lora.target_modules, lora.exclude_modules))


def test_adapters_sit_where_theirs_sat(
    desk: Path, capsys: pytest.CaptureFixture[str], tiny_checkpoints: dict[str, Path]
) -> None:
    """Their defaults, and what their filters name: parts of names, in the blocks or anywhere."""
    flux, qwen = (linear_layers(name, tiny_checkpoints) for name in ("FluxKontext", "QwenImageEdit"))
    every = {each: {name for name, module in each.named_modules() if isinstance(module, torch.nn.Linear)}
             for each in (flux, qwen)}  # fmt: skip

    converted(capsys, "ai.yaml")
    inside = {each: {name for name in every[each] if "transformer_blocks." in name} for each in every}
    assert on(Path("my_run.yaml"), qwen) == inside[qwen] and any("img_mod" in name for name in inside[qwen])
    kwargs = {"only_if_contains": ["transformer.single_transformer_blocks.0.", "attn"], "ignore_if_contains": ["to_k"]}
    project = yaml.safe_load(AI_TOOLKIT)
    project["config"]["process"][0]["network"]["network_kwargs"] = kwargs
    Path("ai.yaml").write_text(yaml.safe_dump(project))
    converted(capsys, "ai.yaml", "--overwrite")
    assert on(Path("my_run.yaml"), flux) == {
        name for name in inside[flux]
        if ("single_transformer_blocks.0." in name or "attn" in name) and "to_k" not in name
    }  # fmt: skip

    converted(capsys, "train.sh", "--overwrite")
    assert on(Path("my_run.yaml"), qwen) == {name for name in inside[qwen] if "_mod." not in name}
    assert on(Path("my_run.yaml"), flux) == {name for name in inside[flux] if "norm" not in name}
    words = '--network_args "loraplus_lr_ratio=4" "exclude_mod=False" "exclude_patterns=[x]" --unheard_of'
    Path("train.sh").write_text(MUSUBI.replace("--unheard_of", words))
    found = converted(capsys, "train.sh", "--overwrite")
    assert on(Path("my_run.yaml"), qwen) == inside[qwen]
    lora = load_config(Path("my_run.yaml")).model.lora
    assert lora is not None and lora.lr_ratio == 4
    assert any("exclude_patterns=[x]: no counterpart" in line["words"] for line in found["keys"])

    converted(capsys, "one.json", "--overwrite")
    assert on(Path("my_run.yaml"), flux) == every[flux]
    Path("one.json").write_text(json.dumps({**ONETRAINER, "layer_filter": "attn, ff.net"}))
    converted(capsys, "one.json", "--overwrite")
    assert on(Path("my_run.yaml"), flux) == {name for name in every[flux] if "attn" in name or "ff.net" in name}

    converted(capsys, "config.json", "--overwrite")
    attention = on(Path("my_run.yaml"), flux)
    assert attention == {name for name in inside[flux] if ".attn." in name}


def test_lokr_of_others(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoKr of full rank has a whole matrix, which is not scaled."""

    def adapter(file: str) -> tuple[Any, ...]:
        converted(capsys, file, "--overwrite")
        lora = load_config(Path("my_run.yaml")).model.lora
        assert lora is not None
        return lora.type, lora.r, lora.lora_alpha, lora.decompose_factor

    project = yaml.safe_load(AI_TOOLKIT)
    network = project["config"]["process"][0]["network"]
    for own, expected in (({"type": "lokr", "lokr_factor": 8}, ("lokr", 8192, 8192, 8)),
                          ({"type": "lokr", "lokr_full_rank": False}, ("lokr", 32, 1, -1)),
                          ({"lokr_full_rank": True, "lokr_factor": -1}, ("lora", 32, 1, -1))):  # fmt: skip
        project["config"]["process"][0]["network"] = {**network, **own}
        Path("ai.yaml").write_text(yaml.safe_dump(project))
        assert adapter("ai.yaml") == expected

    Path("config.json").write_text(json.dumps({**SIMPLETUNER, "lora_type": "lycoris", "lycoris_config": "lyc.json"}))
    for tree, expected in (({"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 10, "multiplier": 1.0},
                            ("lokr", 8192, 8192, 10)),
                           ({"algo": "loha", "linear_dim": 8, "linear_alpha": 4}, ("loha", 8, 4, -1))):  # fmt: skip
        Path("lyc.json").write_text(json.dumps({**tree, "apply_preset": {"target_module": ["Attention"]}}))
        assert adapter("config.json") == expected
    assert "lycoris.apply_preset.target_module" in {
        line["theirs"] for line in converted(capsys, "config.json", "--overwrite")["keys"] if line["lost"]
    }
    Path("one.json").write_text(json.dumps({**ONETRAINER, "peft_type": "OFT_2", "oft_block_size": 64}))
    converted(capsys, "one.json", "--overwrite")
    lora = load_config(Path("my_run.yaml")).model.lora
    assert lora is not None and (lora.type, lora.oft_block_size) == ("oft", 64)
