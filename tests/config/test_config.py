"""What a configuration file may say, what it then means, and what is said about one that cannot be run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from qwen_image_finetune.config import SPELLINGS, Config, ConfigError, load_config
from qwen_image_finetune.config.idle import IDLE
from qwen_image_finetune.config.reference import reference
from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.config.tree import ABSENT, find, put
from qwen_image_finetune.config.words import distance, known_keys, section_of

ROOT = Path(__file__).parents[2]
MODEL = "model.pretrained_model_name_or_path"
EDIT = "Qwen/Qwen-Image-Edit"

Load = Callable[..., Config]


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        assert put(tree, key, value) is None
    return tree


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load({"train.num_epochs": 3}, "override=1")`: the configuration of a file with these keys and a model."""

    def load(keys: dict[str, Any] | None = None, *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(nested({MODEL: EDIT, **(keys or {})})), encoding="utf-8")
        return load_config(path, overrides)

    return load


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    """The same from YAML as it is typed."""

    def load_text(text: str, *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


# What it means.


def test_a_model_is_enough(load: Load) -> None:
    config = load()
    assert config == Config.model_validate({"model": {"pretrained_model_name_or_path": EDIT}})
    assert config.max_steps == 1000
    assert config.notes == ()


def test_numbers_as_people_write_them(load_text: Load) -> None:
    config = load_text(
        f"model: {{pretrained_model_name_or_path: {EDIT}}}\n"
        "train: {max_train_steps: 1e3, seed: 7.0, mixed_precision: no, max_grad_norm: 1}\n"
        "optimizer: {init_args: {lr: 1e-4, eps: 1E-8, betas: [0.9, 0.999]}}\n"
        "logging: {report_to: none}\n"
    )
    assert config.optimizer.init_args == {"lr": 0.0001, "eps": 1e-8, "betas": [0.9, 0.999]}
    assert (config.train.max_train_steps, config.train.seed, config.train.mixed_precision) == (1000, 7, "no")
    assert config.logging.trackers == ()


def test_interpolation(load: Load) -> None:
    config = load({
        "cache.use_cache": True,
        "data.init_args.use_cache": "${cache.use_cache}",
        "data.init_args.cache_dir": "${cache.cache_dir}",  # not written: its default
        "logging.output_dir": "out/${train.seed}/${cache.cache_dir}",
        "train.max_train_steps": "${train.seed}",
        "train.seed": 5,
    })  # fmt: skip
    assert (config.cache.use_cache, config.cache.cache_dir) == (True, "cache")
    assert (config.logging.output_dir, config.train.max_train_steps) == ("out/5/cache", 5)
    assert config.notes == ()


def test_interpolation_reads_an_older_spelling_of_what_it_names(load: Load) -> None:
    config = load({"model.rank": 8, "logging.output_dir": "rank-${model.lora.r}"})
    assert config.logging.output_dir == "rank-8"
    config = load(
        {"data.init_args.use_cache": "${cache.use_cache}", "logging.output_dir": "${cache.use_cache}"},
        "logging.output_dir=x",
    )
    assert config.cache.use_cache is False


def test_override_comes_before_interpolation(load: Load) -> None:
    keys = {"cache.cache_dir": "a", "logging.output_dir": "${cache.cache_dir}/out", "cache.use_cache": True}
    config = load(keys, "cache.cache_dir=b", "data.init_args.image_size=[832, 576]", "optimizer.init_args={lr: 3e-5}")
    assert config.logging.output_dir == "b/out"
    assert config.data.init_args.image_size == [832, 576]
    assert config.optimizer.init_args == {"lr": 3e-5}
    assert load(keys, "train.resume_from_checkpoint=").train.resume_from_checkpoint is None


def test_override_by_an_older_spelling_has_the_last_word(load: Load) -> None:
    assert load({"model.lora.r": 16}, "model.rank=4").model.lora == load({"model.lora.r": 4}).model.lora
    config = load({"train.resume_from_checkpoint": "old"}, "resume_from_checkpoint=latest")
    assert config.train.resume_from_checkpoint == "latest"


def test_lora_null_is_full_fine_tuning_and_an_absent_one_is_not(load: Load, load_text: Load) -> None:
    assert load({"model.lora": None}).model.lora is None
    assert load({}, "model.lora=null").model.lora is None
    assert load_text(f"model:\n  pretrained_model_name_or_path: {EDIT}\n  lora:\n").model.lora is None
    assert load().model.lora is not None
    assert load({"model.lora": {}}).model.lora == load().model.lora


def test_sections_with_all_keys_commented_out_mean_their_defaults(load_text: Load) -> None:
    empty = "\n".join(f"{name}:" for name in Config.model_fields if name != "model")
    text = f"model: {{pretrained_model_name_or_path: {EDIT}}}\n"
    assert load_text(text + empty) == load_text(text + "data: {init_args: }\npredict: {devices: }") == load_text(text)
    assert load_text(text + "optimizer: {init_args: }") == load_text(text)
    other = "optimizer: {class_path: torch.optim.SGD"
    assert load_text(text + other + ", init_args: }") == load_text(text + other + "}")


def test_default_learning_rate_is_that_of_the_default_optimizer_alone(load: Load) -> None:
    assert load().optimizer.init_args == {"lr": 1e-4}
    assert load({"optimizer.class_path": "prodigyopt.Prodigy"}).optimizer.init_args == {}


@pytest.mark.parametrize(("older", "today"), SPELLINGS)
def test_older_spellings_move(load: Load, older: str, today: str) -> None:
    default, other = find(load().model_dump(), today), {bool: True, int: 7, float: 0.25, str: "x"}
    value = other[type(default)] if default is not None else "latest"
    value = (not default) if isinstance(default, bool) else value
    config = load({older: value})
    assert find(config.model_dump(), today) == value
    assert not any(older in note for note in config.notes)
    assert load({older: value, today: value}) == config


def test_disagreeing_spellings(load: Load) -> None:
    config = load({"model.rank": 8, "model.lora.r": 16, "model.lora.lora_alpha": 4})
    assert config.model.lora is not None
    assert (config.model.lora.r, config.model.lora.lora_alpha) == (16, 4)
    assert config.notes == ("model.rank=8 and model.lora.r=16 disagree; model.lora.r wins",)
    assert load({"model.rank": 8, "model.lora.lora_alpha": 4}).model.lora.lora_alpha == 4  # type: ignore[union-attr]
    config = load({"data.batch_size": 2, "data.init_args.batch_size": 4})
    assert config.data.batch_size == 2
    assert config.notes == ("data.init_args.batch_size=4 and data.batch_size=2 disagree; data.batch_size wins",)


def test_a_data_set_class_of_ones_own_takes_its_own_arguments(load: Load) -> None:
    config = load({"data.class_path": "mine.Pairs", "data.init_args.colour": "red", "data.init_args.crop_size": 3})
    assert config.data.init_args.model_extra == {"colour": "red"}
    assert config.notes == ()


# What is refused.


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"train.num_epoch": 3}, "'train.num_epoch' is not a key; the nearest is 'train.num_epochs'"),
        ({"train.batch_size": 3}, "'train.batch_size' is not a key; the nearest is 'data.batch_size'"),
        ({"train.lr": 3}, "'train.lr' is not a key; the nearest is 'optimizer.init_args.lr'"),
        ({"train.steps": 3}, "'train.steps' is not a key; the nearest is 'train.max_train_steps'"),
        ({"network.linear": 3}, "'network' is not a key; the nearest is 'model.lora'"),
        ({"optimizer.learning_rate": 3}, "nearest is 'optimizer.init_args.lr'"),
        ({"trian.seed": 3}, "'trian' is not a key; the nearest is 'train'"),
        (
            {"loss.something_else": 1},
            "'loss.something_else' is not a key; loss has loss.type, loss.huber_delta",
        ),
        (
            {"data.init_args.image_sizes": 1},
            "'data.init_args.image_sizes' is not a key; the nearest is 'data.init_args.image_size'",
        ),
        ({"train.num_epochs": 0}, "train.num_epochs=0 is refused; allowed: whole number from 1 to 10^9 or null"),
        ({"train.num_epochs": 1.5}, "train.num_epochs=1.5 is refused"),
        ({"train.num_epochs": True}, "train.num_epochs=true is refused"),
        ({"train.num_epochs": "3"}, "train.num_epochs='3' is refused"),
        ({"train.seed": 2**63}, f"train.seed={2**63} is refused; allowed: whole number from 0, below 2^63"),
        ({"train.seed": -1}, "train.seed=-1 is refused"),
        ({"validation.seed": 2**64}, f"validation.seed={2**64} is refused"),
        ({"train.low_memory": 1}, "train.low_memory=1 is refused; allowed: true or false"),
        ({"train.max_grad_norm": float("inf")}, "train.max_grad_norm=Infinity is refused; allowed: number above 0"),
        (
            {"train.mixed_precision": "fp32"},
            'train.mixed_precision=\'fp32\' is refused; allowed: "no", "fp16" or "bf16"',
        ),
        ({"train.mixed_precision": True}, "train.mixed_precision=true is refused"),
        ({"train": 3}, "train=3 is refused; allowed: a section with keys of trainer, num_epochs"),
        (
            {"train.trainer": "FluxKontxt"},
            f"train.trainer='FluxKontxt' is not one of {sorted(FAMILIES)}; did you mean 'FluxKontext'",
        ),
        (
            {"train.vae_encoder_device": "gpu:0"},
            "train.vae_encoder_device='gpu:0' is refused; allowed: cpu, cuda, cuda:N",
        ),
        (
            {"model.lora.init_lora_weights": "gausian"},
            "model.lora.init_lora_weights='gausian' is refused; allowed: true or false or \"gauss",
        ),
        ({"model.lora.init_lora_weights": "eva"}, "model.lora.init_lora_weights='eva' is refused"),
        ({"model.lora.init_lora_weights": "loftq"}, "model.lora.init_lora_weights='loftq' is refused"),
        ({"model.lora.target_modules": []}, "model.lora.target_modules=[] is refused"),
        ({"model.lora.target_modules": "to_(q"}, "model.lora.target_modules='to_(q' is not a regular expression"),
        ({"model.quantize": "fp16"}, "model.quantize='fp16' is refused; allowed: true or false or \"fp8\""),
        ({"model.quantize": True, "model.lora": None}, "model.quantize=true with model.lora=null"),
        ({"model.lora.init_lora_weights": "orthogonal", "model.lora.r": 5}, "needs an even rank, not model.lora.r=5"),
        ({"model.lora.init_lora_weights": "pissa", "model.quantize": True}, "which model.quantize=true quantises"),
        ({"model.rank": 8, "model.lora": None}, "model.rank=8 contradicts model.lora=null"),
        (
            {"data.init_args.image_size": [832]},
            "data.init_args.image_size=[832] is refused; allowed: [width, height] or null",
        ),
        ({"data.init_args.image_size": [8, 8], "data.init_args.resolution": 8}, "exclude each other"),
        ({"data.init_args.center_crop": True, "data.init_args.random_crop": True}, "exclude each other"),
        ({"data.init_args.crop_scale": [0.9, 0.5]}, "data.init_args.crop_scale=[0.9, 0.5] is not [smallest, largest]"),
        (
            {"data.init_args.caption_dropout_rate": 1.5},
            "caption_dropout_rate=1.5 is refused; allowed: number from 0 to 1",
        ),
        (
            {"data.init_args.dataset_path": []},
            "data.init_args.dataset_path=[] is refused; allowed: text or list of text",
        ),
        ({"optimizer.class_path": "torch..AdamW"}, "optimizer.class_path='torch..AdamW' is refused"),
        ({"optimizer.class_path": "os.system('true')"}, "is refused; allowed: import path"),
        ({"optimizer.class_path": ".AdamW"}, "optimizer.class_path='.AdamW' is refused"),
        ({"lr_scheduler.scheduler_type": "cosin"}, "lr_scheduler.scheduler_type='cosin' is refused"),
        (
            {"lr_scheduler.scheduler_type": "cosine_with_restarts", "lr_scheduler.num_cycles": 0.5},
            "lr_scheduler.num_cycles=0.5 is refused",
        ),
        ({"logging.report_to": ["wandb", "none"]}, "none excludes the others"),
        ({"logging.report_to": ["wandbb"]}, "logging.report_to=['wandbb'] is refused".replace("'", '"')),
        ({"logging.tracker_project_name": "../other"}, "logging.tracker_project_name='../other' is refused"),
        ({"loss.mask_loss": True}, "loss.mask_loss=true needs data.init_args.use_edit_mask=true"),
        ({"loss.background_weight": -1}, "loss.background_weight=-1 is refused; allowed: number from 0"),
        ({MODEL: ""}, "model.pretrained_model_name_or_path='' is refused"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_refused(load: Load, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(keys)
    assert words in str(refusal.value)
    assert "run.yaml: " in str(refusal.value), "one problem, one line"


def test_model_is_required(load_text: Load) -> None:
    with pytest.raises(
        ConfigError, match=r"run.yaml: model.pretrained_model_name_or_path is missing: hub id or folder"
    ):
        load_text("model: {}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: model is missing"):
        load_text("train: {seed: 1}\n")


def test_all_problems_in_one_message(load: Load) -> None:
    keys = {MODEL: "Qwen/Qwen2-VL-7B-Instruct", "train.trainer": "Flix", "train.sed": 1, "model.lora.r": -1}
    with pytest.raises(ConfigError) as refusal:
        load(keys | {"cache.cache_dir": 5}, "train.num_epochs=x")
    first, *lines = str(refusal.value).splitlines()
    assert first.endswith("run.yaml with overrides has 6 problems:")
    for part in ("Qwen2-VL", "'Flix'", "train.sed", "model.lora.r=-1", "cache.cache_dir=5", "train.num_epochs='x'"):
        assert sum(part in line for line in lines) == 1


@pytest.mark.parametrize(
    "override",
    ["train.seed", "=3", "train seed=3", "train..seed=3", "train.seed=[", "train.seed=a: b", "train.seed=1\nb: 2"],
)
def test_broken_override(load: Load, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load({}, override)


@pytest.mark.parametrize("override", ["model.lora.r=8", "model.rank=8"])
def test_override_inside_what_is_no_section(load: Load, override: str) -> None:
    with pytest.raises(ConfigError, match=r"inside model\.lora=null, which is no section"):
        load({"model.lora": None}, override)


def mistyped(draw: st.DrawFn, word: str) -> str:
    """`word` with one letter inserted, deleted, replaced or swapped with the next."""
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_0123456789"))
    place = draw(st.integers(0, len(word) - 1))
    return draw(st.sampled_from([
        word[:place] + letter + word[place:],
        word[:place] + word[place + 1 :],
        word[:place] + letter + word[place + 1 :],
        word[:place] + word[place : place + 2][::-1] + word[place + 2 :],
    ]))  # fmt: skip


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str]:
    """A key that is mistyped in its last name, and the right one."""
    key = draw(st.sampled_from(sorted(known_keys())))
    outer, dot, name = key.rpartition(".")
    wrong = outer + dot + mistyped(draw, name)
    assume(wrong not in known_keys() and not wrong.endswith(".") and wrong)
    assume(wrong not in [older for older, _ in SPELLINGS])
    return wrong, key


@given(typos())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_typo_is_refused_and_the_right_key_named(load: Load, typo: tuple[str, str]) -> None:
    wrong, key = typo
    with pytest.raises(ConfigError) as refusal:
        load({wrong: None})
    assert f"{wrong!r} is not a key; the nearest is " in str(refusal.value)
    assert repr(key) in str(refusal.value)


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
@settings(deadline=None)
def test_distance_is_one_for_one_typo_and_never_more_than_by_letters(first: str, second: str, third: str) -> None:
    assert (distance(first, second) == 0) == (first == second)
    assert distance(first, second) == distance(second, first) <= max(len(first), len(second))
    assert distance(first + third, second + third) <= distance(first, second)
    assert distance("ab" + third, "ba" + third) == 1


# What is said.


NOTED: dict[str, Any] = {
    "model.lora.init_lora_weights": ("gaussian", {"model.lora.pretrained_weight": "x.safetensors"}, {}),
    "train.save_precision": ("fp32", {}, {"model.lora": None}),
    "train.guidance_scale": (3.5, {"train.trainer": "QwenImageEdit"}, {"train.trainer": "FluxKontext"}),
    "predict.devices.text_encoder_2": ("cpu", {"train.trainer": "QwenImageEdit"}, {}),
    "data.init_args.center_crop_ratio": (0.5, {}, {"data.init_args.center_crop": True}),
    "data.init_args.crop_size": (64, {}, {"data.init_args.random_crop": True}),
    "data.init_args.crop_scale": ([0.5, 1.0], {}, {"data.init_args.random_crop": True}),
    "data.init_args.use_edit_mask": (True, {"loss.mask_loss": "difference"}, {"loss.mask_loss": True}),
    "train.vae_encoder_device": ("cpu", {"cache.use_cache": True}, {}),
    "train.text_encoder_device": ("cpu", {"cache.use_cache": True}, {}),
    "train.text_encoder_2_device": ("cuda:1", {"cache.use_cache": True}, {}),
    "train.keep_activations": (0.5, {}, {"train.gradient_checkpointing": True}),
    "train.gradient_checkpointing": (True, {"train.memory": "auto"}, {}),
    "train.offload_activations": (True, {"train.memory": "auto"}, {}),
    "train.blocks_to_swap": (2, {"train.memory": "auto"}, {"train.gradient_checkpointing": True}),
    "lr_scheduler.warmup_steps": (100, {}, {"lr_scheduler.scheduler_type": "constant_with_warmup"}),
    "lr_scheduler.num_cycles": (
        2,
        {"lr_scheduler.scheduler_type": "linear"},
        {"lr_scheduler.scheduler_type": "cosine_with_restarts"},
    ),
    "lr_scheduler.power": (
        2.0,
        {"lr_scheduler.scheduler_type": "cosine"},
        {"lr_scheduler.scheduler_type": "polynomial"},
    ),
    "cache.cache_dir": ("elsewhere", {}, {"cache.use_cache": True}),
    "cache.vae_encoder_device": ("cuda:1", {}, {"cache.use_cache": True}),
    "cache.text_encoder_device": ("cuda:1", {}, {"cache.use_cache": True}),
    "cache.text_encoder_2_device": ("cuda:1", {}, {"cache.use_cache": True}),
    "cache.prompt_empty_drop_keys": (["x"], {"cache.use_cache": True}, {"data.init_args.caption_dropout_rate": 0.1}),
    "cache.num_variations": (4, {}, {"cache.use_cache": True, "data.init_args.random_flip": True}),
    "logging.logging_dir": ("elsewhere", {}, {"logging.report_to": ["tensorboard", "wandb"]}),
    "validation.steps": (7, {}, {"validation.enabled": True}),
    "validation.num_validation_samples": (7, {}, {"validation.enabled": True}),
    "validation.samples": ([{"prompt": "a hat"}], {}, {"validation.enabled": True}),
    "validation.dataset_path": ("held_out", {}, {"validation.enabled": True}),
    "validation.share": (0.5, {}, {"validation.enabled": True}),
    "validation.num_loss_pairs": (
        7,
        {"validation.enabled": True},
        {"validation.enabled": True, "validation.share": 0.5},
    ),
    "validation.num_loss_sigmas": (7, {}, {"validation.enabled": True, "validation.dataset_path": "held_out"}),
    "validation.num_inference_steps": (7, {}, {"validation.enabled": True}),
    "validation.guidance_scale": (7, {}, {"validation.enabled": True}),
    "validation.seed": (7, {}, {"validation.enabled": True}),
    **{
        f"train.ema.{key}": (value, {}, {"train.ema.enabled": True})
        for key, value in {"decay": 0.9, "start_step": 2, "every": 2, "device": "cpu"}.items()
    },
    "loss.huber_delta": (0.2, {}, {"loss.type": "huber"}),
    "loss.huber_schedule": ("exponential", {}, {"loss.type": "pseudo_huber"}),
    "loss.preservation.prompts": (["as it is"], {}, {"loss.preservation.weight": 1}),
    "loss.preservation.dataset_path": ("others", {}, {"loss.preservation.weight": 1}),
    "data.init_args.max_buckets": (4, {"data.init_args.image_size": [64, 64]}, {}),
    "loss.foreground_weight": (3, {}, {"loss.mask_loss": True, "data.init_args.use_edit_mask": True}),
    "loss.background_weight": (3, {}, {"loss.mask_loss": True, "data.init_args.use_edit_mask": True}),
}


@pytest.mark.parametrize("key", NOTED)
def test_key_without_effect_is_said_once_and_one_with_effect_is_not(load: Load, key: str) -> None:
    value, idle, active = NOTED[key]
    notes = load({**idle, key: value}).notes
    assert [note.partition("=")[0] for note in notes] == [key]
    assert load({**active, key: value}).notes == ()


def test_revision_of_a_folder_has_no_effect(load: Load, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    [note] = load({MODEL: str(tmp_path), "model.revision": "main"}).notes
    assert note == "model.revision='main' has no effect: the model is a local folder"
    assert load({"model.revision": "main"}).notes == ()


def test_workers_live_to_the_end_of_a_run_whatever_is_said(load: Load) -> None:
    [note] = load({"data.num_workers": 2, "data.persistent_workers": True}).notes
    assert note.startswith("data.persistent_workers=true has no effect: a run reads its data in one pass")


@pytest.mark.parametrize("cached", [False, True])
def test_qwen_has_no_second_text_encoder_to_place(load: Load, cached: bool) -> None:
    key = f"{'cache' if cached else 'train'}.text_encoder_2_device"
    [note] = load({"train.trainer": "QwenImageEdit", "cache.use_cache": cached, key: "cpu"}).notes
    assert note == f"{key}='cpu' has no effect: Qwen-Image-Edit has one text encoder"


def test_files_that_few_programs_read_are_said_at_the_start(load: Load) -> None:
    for kind, words in (("loha", "diffusers does not"), ("oft", "neither diffusers nor ComfyUI reads")):
        [note] = load({"model.lora.type": kind}).notes
        assert words in note
    assert load({"model.lora.type": "lokr"}).notes == ()


def test_every_idle_key_is_a_key_and_is_tested() -> None:
    assert {key for key, _, _ in IDLE} == {*NOTED, "model.revision", "data.persistent_workers"}
    assert {key for key, _, _ in IDLE} <= set(known_keys())


@pytest.mark.parametrize("key", ["random_crop", "random_flip"])
def test_the_cache_keeps_one_crop_and_flip_unless_more_are_asked_for(load: Load, key: str) -> None:
    settings = {f"data.init_args.{key}": True, "cache.use_cache": True}
    [note] = load(settings).notes
    assert "every sample keeps the one it is cached with; cache.num_variations" in note
    assert load({**settings, "cache.num_variations": 4}).notes == ()
    [note] = load({"cache.use_cache": True, "cache.num_variations": 4}).notes
    assert note.startswith("cache.num_variations=4 has no effect: neither data.init_args.random_crop nor")


@pytest.mark.parametrize(
    "name", ["prodigyopt.Prodigy", "prodigyplus.ProdigyPlusScheduleFree", "dadaptation.DAdaptLion"]
)
def test_an_optimizer_that_finds_its_rate_is_not_to_be_given_a_small_one(load: Load, name: str) -> None:
    [note] = load({"optimizer.class_path": name, "optimizer.init_args.lr": 1e-4}).notes
    assert note.startswith(f"optimizer.init_args.lr=0.0001 makes {name} crawl: it finds the learning rate by itself")
    assert load({"optimizer.class_path": name, "optimizer.init_args.lr": 0.5}).notes == ()
    assert load({"optimizer.class_path": name}).notes == ()  # its own default, 1.0
    assert load({"optimizer.class_path": "torch.optim.Adam", "optimizer.init_args.lr": 1e-4}).notes == ()


@pytest.mark.parametrize("name", ["schedulefree.AdamWScheduleFree", "pytorch_optimizer.ScheduleFreeAdamW"])
def test_a_schedule_beside_a_schedule_free_optimizer_is_said(load: Load, name: str) -> None:
    [note] = load({"optimizer.class_path": name, "lr_scheduler.scheduler_type": "cosine"}).notes
    assert note.startswith(f"lr_scheduler.scheduler_type=cosine with {name}: it averages its weights")
    assert load({"optimizer.class_path": name, "lr_scheduler.scheduler_type": "constant_with_warmup"}).notes == ()
    assert load({"optimizer.class_path": "torch.optim.Adam", "lr_scheduler.scheduler_type": "cosine"}).notes == ()


def test_a_warm_up_as_long_as_the_run_is_said(load: Load) -> None:
    settings: dict[str, Any] = {"lr_scheduler.scheduler_type": "cosine", "train.max_train_steps": 100}
    [note] = load({**settings, "lr_scheduler.warmup_steps": 100}).notes
    assert note.startswith("lr_scheduler.warmup_steps=100, but the run ends after 100 steps (train.max_train_steps)")
    [note] = load({**settings, "lr_scheduler.warmup_steps": 100, "train.num_epochs": 3}).notes  # ends no later
    assert load({**settings, "lr_scheduler.warmup_steps": 99}).notes == ()
    by_epochs = {"lr_scheduler.scheduler_type": "cosine", "lr_scheduler.warmup_steps": 2000, "train.num_epochs": 3}
    assert load(by_epochs).notes == ()  # how many steps that is, the data say


# Back to YAML, and the reference.


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_round_trip_of_every_configuration(path: Path, load_text: Load) -> None:
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    # the demo and the pretraining of toy bases name checkpoints that they make
    own = written["model"]["pretrained_model_name_or_path"].startswith(("demo/", "build/"))
    overrides = [f"{MODEL}={EDIT}"] if own else []
    config = load_config(path, overrides)
    assert load_text(config.to_yaml()) == config


AWKWARD = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
    st.text("${}\\: .#'\"-?ab\n", min_size=1),
    st.sampled_from(
        ["1e-4", "no", "null", "~", "2024-01-01", "0x1f", "12:30", "${cache.cache_dir}", "\\${a}", "a\\", "<<", "="]
    ),
)


@given(
    output=AWKWARD,
    paths=st.lists(AWKWARD, min_size=1, max_size=2),
    arguments=st.lists(AWKWARD, min_size=4, max_size=12),
    rate=st.floats(0, 1),
    lr=st.floats(1e-12, 1e3),
)
@example(output="\\${:", paths=["${a:b}"], arguments=["${:"], rate=0.0, lr=1.0)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_of_awkward_values(
    load_text: Load, output: str, paths: list[str], arguments: list[str], rate: float, lr: float
) -> None:
    """Few examples of many strings each: reading a configuration takes far longer than one string more in it."""
    assume("???" not in (output, *arguments, *paths))  # OmegaConf's word for a value that is still to be given
    assume(not any(path.startswith("~") for path in paths))  # the home of nobody is refused
    config = Config.model_validate({
        "model": {"pretrained_model_name_or_path": EDIT, "lora": None},
        "data": {"init_args": {"dataset_path": paths, "caption_dropout_rate": rate}},
        "optimizer": {"init_args": {"lr": lr, "name": arguments[0], "inner": {"deep": [*arguments, None, True]}}},
        "logging": {"output_dir": output},
    })  # fmt: skip
    assert load_text(config.to_yaml()) == config


def test_configuration_is_frozen(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.seed = 3  # type: ignore[misc]


def test_reference_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m qwen_image_finetune.config > docs/configuration.md"
    printed = subprocess.run(
        [sys.executable, "-m", "qwen_image_finetune.config"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert printed.stdout == page
    for key, field in known_keys().items():
        assert f"| `{key}` |" in page or section_of(field.annotation) is not None


def test_every_key_has_a_meaning_and_an_older_spelling_a_place() -> None:
    for key, field in known_keys().items():
        assert field.description or "." not in key, key
    for older, today in SPELLINGS:
        assert today in known_keys() and older not in known_keys()


def test_nothing_heavy_is_imported() -> None:
    source = (
        "import sys; from qwen_image_finetune.config import load_config, ConfigError\n"
        "try: load_config('nowhere.yaml')\n"
        "except ConfigError as error: print(error)\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "nowhere.yaml does not exist\n[]\n"


def test_the_door_of_older_scripts() -> None:
    from src.data.config import load_config_from_yaml

    assert load_config_from_yaml is load_config
    assert find({"a": None}, "a") is None and find({"a": None}, "a.b") is ABSENT
