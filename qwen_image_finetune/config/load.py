"""From a YAML file and overrides to a checked `Config`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from qwen_image_finetune.config.family import file_problems, model_problems, trainer_problems
from qwen_image_finetune.config.idle import idle_notes
from qwen_image_finetune.config.interpolation import resolve
from qwen_image_finetune.config.root import Config
from qwen_image_finetune.config.spellings import SPELLINGS, canonicalise
from qwen_image_finetune.config.text import parse_mapping, read_yaml
from qwen_image_finetune.config.tree import find, put, remove, shown
from qwen_image_finetune.config.values import ConfigError
from qwen_image_finetune.config.words import known_keys, problems, section_of, take_unknown, unknown

OVERRIDE = re.compile(r"(\w+(?:\.\w+)*)=(.*)")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the file `path`, with ``section.key=value`` overrides; their values are YAML.

    An override replaces what the file says, before interpolations are resolved. Nothing is executed, imported or
    downloaded; `Config.notes` has what the person should be told.

    Raises:
        ConfigError: everything that is wrong, one line each, with the key, what was given and what is allowed.
    """
    source = f"{path} with overrides" if overrides else str(path)
    tree: Any = OmegaConf.to_container(read_yaml(Path(path)))
    _refuse_other_programs(tree, path)
    _open_empty_sections(tree)
    for override in overrides:
        _override(tree, override)
    values = resolve(tree, source)
    config, lines = _check(values)
    if config is None:
        listed = lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        raise ConfigError(f"{source}: {listed}" if len(lines) == 1 else f"{source} has {len(lines)} problems:{listed}")
    return config


def _refuse_other_programs(tree: dict[str, Any], path: str | Path) -> None:
    """A file of ai-toolkit has none of our sections: a list of what is wrong with it would be all of it."""
    config = tree.get("config")
    if isinstance(config, dict) and "process" in config:
        raise ConfigError(
            f"{path} is a configuration of ai-toolkit (config.process), whose keys are not those of this program: "
            "`qif convert` turns it into one; docs/configuration.md has every key, and what ai-toolkit calls it"
        )


def _check(values: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The configuration that nested, resolved `values` make, with its notes; or None and every problem."""
    notes, wrong = canonicalise(values)
    wrong += [unknown(key) for key in take_unknown(values)]
    wrong += model_problems(find(values, "model.pretrained_model_name_or_path"))
    wrong += file_problems(find(values, "model.transformer_file"))
    wrong += trainer_problems(find(values, "train.trainer"))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        return None, list(dict.fromkeys(wrong + problems(error, values)))
    if wrong:
        return None, list(dict.fromkeys(wrong))
    config._notes.extend([*notes, *idle_notes(config)])
    return config, []


def _override(tree: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value`` to `tree`; an older spelling sets today's key, so that the last word counts."""
    said = override if len(override) <= 200 else f"{override[:200]}..."
    match = OVERRIDE.fullmatch(override)
    if match is None:
        raise ConfigError(f"the override {said!r} is not section.key=value on one line")
    key = next((today for older, today in SPELLINGS if match[1] == older), match[1])
    parsed: Any = OmegaConf.to_container(parse_mapping(f"value: {match[2]}", f"the override {said!r}"))
    if (obstacle := put(tree, key, parsed["value"])) is not None:
        raise ConfigError(
            f"the override {said!r} sets a key inside {obstacle}={shown(find(tree, obstacle))}, which is no section"
        )
    _open_empty_sections(tree)


def _open_empty_sections(tree: dict[str, Any]) -> None:
    """A section with nothing under it (all its keys commented out, say) is null in YAML and means its defaults.

    model.lora alone may be null: it asks for full fine-tuning.
    """
    for key, field in known_keys().items():
        section = section_of(field.annotation)
        if section is not None and field.annotation is section and find(tree, key) is None:
            put(tree, key, {})
    if find(tree, "optimizer.init_args") is None:
        remove(tree, "optimizer.init_args")  # whose default hangs on the class
