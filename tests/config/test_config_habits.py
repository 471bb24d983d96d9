"""Configurations as others write them, and numbers and references without measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_image_finetune.config import Config, ConfigError, load_config

MODEL = "model: {pretrained_model_name_or_path: Qwen/Qwen-Image-Edit}\n"


def loaded(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(MODEL + text)
    return load_config(path, overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, text, *overrides)
    assert len(str(error.value)) < 2000
    return str(error.value)


# Files of the framework that the guide comes from


def test_embeddings_in_the_singular_and_a_project_with_a_slash(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        "cache: {prompt_empty_drop_keys: [prompt_embed, pooled_prompt_embed]}\n"
        "logging: {tracker_project_name: face_segmentation/}\n",
    )
    assert config.cache.prompt_empty_drop_keys == ["prompt_embeds", "pooled_prompt_embeds"]
    assert config.logging.tracker_project_name == "face_segmentation"
    assert "logging.tracker_project_name='face_segmentation/' is read as 'face_segmentation'" in config.notes


@pytest.mark.parametrize("cached,rate,wins", [("true", 0.1, "data.init_args.cache_drop_rate"),
                                              ("false", 0.05, "data.init_args.caption_dropout_rate")])  # fmt: skip
@pytest.mark.parametrize("place", ["cache: {{use_cache: {}}}\n", "data: {{use_cache: {}, "])
def test_the_rate_of_the_cache_holds_where_it_is_used(
    tmp_path: Path, place: str, cached: str, rate: float, wins: str
) -> None:
    rates = "init_args: {caption_dropout_rate: 0.05, cache_drop_rate: 0.1}}\n"
    text = place.format(cached)
    config = loaded(tmp_path, text + rates if text.startswith("data") else text + "data: {" + rates)
    assert config.data.init_args.caption_dropout_rate == rate
    assert any(note.endswith(f"disagree; {wins} wins") for note in config.notes)


@pytest.mark.parametrize(
    "text,words",
    [
        ("resume: latest", "train.resume_from_checkpoint"),
        ("trainer: QwenImageEdit", "train.trainer"),
        ("cache: {devices: {vae: cuda:0}}", "cache.vae_encoder_device"),
        ("predict: {devices: {dit: cuda:0}}", "predict.devices.transformer"),
        ("train: {fit_device: cuda:1}", "CUDA_VISIBLE_DEVICES"),
        ("sampling: {enable: true}", "validation"),
        ("data: {init_args: {dataset_path: [{repo_id: some/faces, split: train}]}}",
         "hf download some/faces --repo-type dataset"),
    ],
)  # fmt: skip
def test_keys_of_its_successor_are_named_with_ours(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, text + "\n")


# Without measure


@pytest.mark.parametrize("form", [
    '"' + "${{data.init_args.k{0}}}" * 10 + '"',
    "[" + ", ".join(['"${{data.init_args.k{0}}}"'] * 10) + "]",
    "{{" + ", ".join(f'x{index}: "${{{{data.init_args.k{{0}}}}}}"' for index in range(10)) + "}}",
])  # fmt: skip
def test_references_do_not_grow_without_bound(tmp_path: Path, form: str) -> None:
    """Eleven keys of ten references each to the next: 10^11 words."""
    lines = [f"  k{level}: {form.format(level + 1)}" for level in range(11)]
    said = refused(tmp_path, "data:\n init_args:\n" + "\n".join(lines) + "\n  k11: word\n class_path: mine.Pairs\n")
    assert "references in data.init_args" in said
    assert "stand for more than 1,000,000 characters" in said


@pytest.mark.parametrize("text", ["${.output_dir}", "${train[seed]}", "${data.${train.trainer}}"])
def test_references_are_written_in_full(tmp_path: Path, text: str) -> None:
    said = refused(tmp_path, f"logging: {{tracker_project_name: '{text}'}}\n")
    assert "a reference is written ${section.key}, in full" in said


def test_a_number_of_thousands_of_digits_is_one_refusal(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path, "", "train.num_epochs=" + "9" * 5000)


def test_references_to_themselves_are_still_named(tmp_path: Path) -> None:
    assert "logging" in refused(tmp_path, "logging: {output_dir: '${logging.logging_dir}', "
                                "logging_dir: '${logging.output_dir}'}\n")  # fmt: skip


@pytest.mark.parametrize(
    "override",
    [
        f"model.lora.r={2**62}", "train.num_epochs=" + "9" * 400, f"train.collective_timeout={10**18}",
        "train.sigma_shift=1e308", "model.lora.lora_alpha=1e308", "loss.foreground_weight=1e300",
        f"data.init_args.image_size=[64, {10**9}]", f"train.max_train_steps={10**30}", f"data.batch_size={2**40}",
        "data.init_args.dataset_path=~nobody-of-this-name/pairs", 'cache.cache_dir="a\\0b"',
        'data.init_args.dataset_path="a\\0b"', "logging.output_dir=~nobody-of-this-name",
    ],
)  # fmt: skip
def test_what_no_run_can_have_is_refused_by_its_key(tmp_path: Path, override: str) -> None:
    said = refused(tmp_path, "", override)
    assert override.partition("=")[0] in said
    assert "refused; allowed" in said
