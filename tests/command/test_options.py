"""What options take: once or repeatedly, and the same range as keys of the configuration."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qwen_image_finetune.command.arguments import build_parser
from qwen_image_finetune.command.cli import VERBS, parse
from qwen_image_finetune.config.text import parse_mapping
from qwen_image_finetune.config.values import Count, NotNegative, Section, Seed, Strength

PREDICT = ["predict", "c.yaml", "--prompt", "x"]


@pytest.mark.parametrize("words, option", [
    ([*PREDICT, "--seed", "1", "--seed=2"], "--seed"),
    ([*PREDICT, "--output", "a.png", "--output", "b.png"], "--output"),
    (["evaluate", "c.yaml", "data", "--count", "1", "--count", "2"], "--count"),
    (["compare", "v0", "--output", "a", "v1", "--output", "b"], "--output"),
    (["plan", "c.yaml", "--card", "24GB", "--card", "H100"], "--card"),
    (["bench", "FluxKontext", "--size", "64", "64", "--size", "128", "128"], "--size"),
    (["export", "a", "b", "--family", "FluxKontext", "--format", "comfy", "--format", "kohya"], "--format"),
])  # fmt: skip
def test_an_option_given_twice_is_refused(words: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(build_parser(VERBS), words)
    assert stopped.value.code == 2
    assert f"{option} is given twice" in capsys.readouterr().err


def test_options_that_join_are_given_repeatedly() -> None:
    loras = parse(build_parser(VERBS), [*PREDICT, "--lora", "a", "--strength", "-1", "--lora", "b", "--strength", "2"])
    assert (loras.loras, loras.strengths) == (["a", "b"], [-1.0, 2.0])
    sweep = parse(build_parser(VERBS), ["evaluate", "c", "d", "--strength", "0", "1", "--lora", "a", "--strength", "2"])
    assert (sweep.lora, sweep.strength) == (["a"], [0.0, 1.0, 2.0])
    assert parse(build_parser(VERBS), ["evaluate", "c", "d"]).strength == [1.0]


@pytest.mark.parametrize("option, name, kind, values", [
    ("--strength", "strengths", Strength, ["nan", "inf", "-inf", "1e30", "-101", "-100", "0", "100", "0.5", "half"]),
    ("--seed", "seed", Seed, ["-1", "0", str(2**63 - 1), str(2**63), str(2**64), "1.5", "1e3", "x"]),
    ("--count", "count", Count, ["0", "1", "nan", "-3"]),
    ("--guidance", "guidance", NotNegative, ["nan", "inf", "-0.1", "0", "7.5"]),
])  # fmt: skip
def test_options_have_the_range_of_keys(option: str, name: str, kind: Any, values: list[str], capsys: Any) -> None:
    """Of a key of the same type in a configuration, as it is read there."""

    class Keys(Section):
        key: kind

    for value in values:
        words = [*PREDICT, f"{option}={value}"]
        try:
            wanted = Keys.model_validate({"key": parse_mapping(f"key: {value}", "x")["key"]}).model_dump()["key"]
        except ValidationError:
            with pytest.raises(SystemExit):
                parse(build_parser(VERBS), words)
            assert f"argument {option}: {value}: it must be a" in capsys.readouterr().err
        else:
            found = vars(parse(build_parser(VERBS), words))[name]
            assert found == ([wanted] if option == "--strength" else wanted)
