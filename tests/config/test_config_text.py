"""Files that are broken or hostile: one clear error that names the file and the line, and nothing is executed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_image_finetune.config import ConfigError, load_config

MODEL = "model: {pretrained_model_name_or_path: Qwen/Qwen-Image-Edit}\n"


def refusal(path: Path, content: str | bytes, *overrides: str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", " is empty"),
        ("# only a comment\n", " is empty"),
        ("- 1\n", " is not a mapping of sections"),
        ("hello\n", " is not a mapping of sections"),
        ("5\n", " is not a mapping of sections"),
        (MODEL + "train: {seed: 1\n", ", line 3 is not valid YAML"),
        (MODEL + "train:\n\tseed: 1\n", ", line 3 is not valid YAML"),
        (MODEL + "train:\n  seed: 1\n  seed: 2\n", ", line 4: the key 'seed' is given twice"),
        (MODEL + MODEL, ", line 2: the key 'model' is given twice"),
        (MODEL + "---\n" + MODEL, " is not valid YAML"),
        (MODEL + "train: *nothing\n", ", line 2: *nothing stands for nothing"),
        (MODEL + "train: &x {seed: *x}\n", ", line 2: *x stands for nothing, or for itself"),
        (MODEL + "train: " + "[" * 100_000, ", line 2: more than 32 levels"),
        (MODEL + "1: 2\n", "'1' is not a key"),
        (MODEL + "train.seed: 2\n", "'train.seed' is written with a dot; nest 'seed' under 'train'"),
        (MODEL + "train:\n  seed: ???\n", "train.seed"),
        (b"model: \xff\xfe\n", " is not text in UTF-8 (byte 7)"),
        (b"model: \x00\n", " is not valid YAML"),
        ("# " + "x" * 1_000_000, " has 1000002 bytes"),
    ],
    ids=lambda value: str(value[:30]),
)
def test_broken_files(tmp_path: Path, content: str | bytes, words: str) -> None:
    message = refusal(tmp_path / "run.yaml", content)
    assert message.startswith(str(tmp_path / "run.yaml"))
    assert words in message


def test_files_of_other_programs(tmp_path: Path) -> None:
    theirs = (
        "job: extension\nconfig:\n  name: first\n  process:\n    - type: sd_trainer\n      network: {linear: 16}\n"
        "meta: {name: '[name]', version: '1.0'}\n"
    )
    said = refusal(tmp_path / "their.yaml", theirs, "train.seed=3")
    assert said.startswith(f"{tmp_path / 'their.yaml'} is a configuration of ai-toolkit (config.process), whose keys")
    assert "docs/configuration.md" in said and "\n" not in said and "missing" not in said
    assert "'config' is not a key" in refusal(tmp_path / "own.yaml", MODEL + "config: {name: first}\n")
    said = refusal(tmp_path / "musubi.toml", '[general]\ncaption_extension = ".txt"\n')
    assert said.startswith(f"{tmp_path / 'musubi.toml'} is TOML, as ") and "is YAML" in said and "\n" not in said
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        load_config(tmp_path / "none.toml")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is not a file"):
        load_config(tmp_path)


def test_byte_order_mark_and_aliases_are_read(tmp_path: Path) -> None:
    text = MODEL + "train: {vae_encoder_device: &d cpu, text_encoder_device: *d}\nlogging: {output_dir: &o out}\n"
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_config(tmp_path / "run.yaml").train.text_encoder_device == "cpu"


def test_aliases_that_grow_without_bound_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    assert "10000 values" in refusal(tmp_path / "run.yaml", MODEL + "\n".join(lines))


@pytest.mark.parametrize(
    "payload",
    [
        "!!python/object/apply:os.system ['touch CANARY']",
        "!!python/object/apply:subprocess.check_call [[touch, CANARY]]",
        "!!python/object/apply:pathlib.Path [CANARY]",
        "!!python/object/new:os.system ['touch CANARY']",
        "!!python/object/new:type {args: [x, [], {}], state: {}}",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!!python/object:pathlib.Path {}",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch CANARY']",
        "!!binary aGVsbG8=",
        "!!set {a, b}",
        "!own {a: 1}",
    ],
)
@pytest.mark.parametrize("place", ["train: {payload}", "train:\n  seed: {payload}", "? {payload}\n: 1"])
def test_tags_are_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: str, place: str
) -> None:
    canary = tmp_path / "canary"
    payload = payload.replace("CANARY", str(canary))
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path / "run.yaml", MODEL + place.format(payload=payload))
    assert ": the tag " in message and message.count("\n") == 0
    assert "the tag " in refusal(tmp_path / "run.yaml", MODEL, f"train.trainer={payload}")
    assert not canary.exists()


def test_tag_shorthand_of_the_file_s_own_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = f"%TAG ! tag:yaml.org,2002:python/\n---\ntrain: !object/apply:os.system ['touch {canary}']\n"
    assert "the tag " in refusal(tmp_path / "run.yaml", text)
    assert not canary.exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "${oc.env:SECRET,none}",
        "x/${oc.env:SECRET}",
        "${${a}:SECRET}",
        "${oc.decode:'1'}",
        "${oc.create:{a: 1}}",
        "${ oc.env : SECRET }",
        "\\\\${oc.env:SECRET}",  # the backslash is escaped, not the dollar
        "\\${a}${oc.env:SECRET}",
    ],
)
def test_resolvers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for message in (
        refusal(tmp_path / "run.yaml", MODEL + f"logging: {{output_dir: {json.dumps(value)}}}"),
        refusal(tmp_path / "run.yaml", MODEL, f"logging.output_dir={json.dumps(value)}"),
    ):
        assert "logging.output_dir=" in message and "environment variables and the like are not read" in message
        assert "hunter2" not in message


def test_an_escaped_resolver_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never resolved, however often the configuration is written and read again."""
    monkeypatch.setenv("SECRET", "hunter2")
    path, text = tmp_path / "run.yaml", MODEL + "logging: {output_dir: '\\${oc.env:SECRET}'}"
    for _ in range(3):
        path.write_text(text)
        config = load_config(path)
        assert config.logging.output_dir == "${oc.env:SECRET}"
        text = config.to_yaml()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "logging: {output_dir: '${cache.nothing}'}",
            "logging.output_dir: Interpolation key 'cache.nothing' not found",
        ),
        ("logging: {output_dir: '${logging.output_dir}'}", "logging.output_dir: Recursive interpolation"),
        ("logging: {output_dir: '${cache.cache_dir}'}\ncache: {cache_dir: '${logging.output_dir}'}", "Recursive"),
        ("logging: {output_dir: '${cache'}", "logging.output_dir"),
    ],
)
def test_references_to_nothing(tmp_path: Path, text: str, words: str) -> None:
    message = refusal(tmp_path / "run.yaml", MODEL + text)
    assert message.startswith(f"{tmp_path / 'run.yaml'}: ") and words in message
