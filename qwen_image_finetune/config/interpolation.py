"""``${section.key}`` in a configuration: resolved by OmegaConf, from the file, other spellings and the defaults."""

from __future__ import annotations

import copy
import re
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen_image_finetune.config.root import Config
from qwen_image_finetune.config.spellings import SPELLINGS
from qwen_image_finetune.config.text import omegaconf_words
from qwen_image_finetune.config.tree import ABSENT, find, only, put, shown, texts
from qwen_image_finetune.config.values import ConfigError

REFERENCE = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*\}")
OPENED = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # not written so that it is text
MOST_CHARACTERS = 1_000_000  # that all references expanded may make of a configuration: as much as a file may have


def resolve(tree: dict[Any, Any], source: str) -> dict[Any, Any]:
    """`tree` with every interpolation replaced by what it stands for.

    Raises:
        ConfigError: a reference to nothing or to itself, a call such as ``${oc.env:HOME}``, a form that is not
            ``${section.key}``, or references that grow beyond `MOST_CHARACTERS`.
    """
    for key, text in texts(tree):
        if _calls(text):
            raise ConfigError(
                f"{source}: {key}={shown(text)} is refused, only ${{section.key}} is resolved: environment variables "
                "and the like are not read, because a configuration, with any secret in it, is written beside the "
                "results and shown to trackers"
            )
    lent = copy.deepcopy(tree)
    for _ in range(len(SPELLINGS)):  # a default or another spelling may itself be a reference
        if not _lend(lent):
            break
    _refuse_growth(lent, source)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(lent), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_words(error, source)) from error
    return cast(dict[Any, Any], only(resolved, tree))


def _calls(text: str) -> bool:
    """Whether a colon stands inside ``${...}``: OmegaConf would call a function there."""
    depth = 0
    for backslashes, token in re.findall(r"(\\*)(\$\{|\}|:)", text):
        if token == ":" and depth > 0:
            return True
        if token == "${" and depth == 0 and len(backslashes) % 2:
            continue  # written so that it is text
        depth = max(0, depth + {"${": 1, "}": -1, ":": 0}[token])
    return False


def _refuse_growth(tree: dict[Any, Any], source: str) -> None:
    """Ten references in each of a dozen keys are 10^12 texts: what they would make is counted before it is made."""
    sizes: dict[str, int] = {}

    def size(value: Any, key: str) -> int:
        if key not in sizes:
            sizes[key] = 0  # of a key within itself, which OmegaConf refuses
            sizes[key] = counted(value, key)
        return sizes[key]

    def counted(value: Any, key: str) -> int:
        if isinstance(value, dict):
            return 1 + sum(size(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items())
        if isinstance(value, list):
            return 1 + sum(counted(inner, key) for inner in value)
        if not isinstance(value, str):
            return 1
        if len(OPENED.findall(value)) > len(REFERENCE.findall(value)):
            raise ConfigError(f"{source}: {key}={shown(value)}: a reference is written ${{section.key}}, in full")
        return len(value) + sum(size(find(tree, other), other) for other in REFERENCE.findall(value))

    if size(tree, "") > MOST_CHARACTERS:
        key = next(key for key, reached in sizes.items() if reached > MOST_CHARACTERS and key not in ("", *tree))
        raise ConfigError(
            f"{source}: the references in {key} stand for more than {MOST_CHARACTERS:,} characters: "
            "write out what is meant"
        )


def _lend(tree: dict[Any, Any]) -> bool:
    """Give every key that is referred to and not written its other spelling's value or its default; whether any."""
    lent = False
    for _, text in list(texts(tree)):
        for key in REFERENCE.findall(text):
            if find(tree, key) is not ABSENT:
                continue
            other = next((spelling for spelling in _spellings(key) if _written(tree, spelling)), None)
            value = find(_defaults(), _spellings(key)[0]) if other is None else f"${{{other}}}"
            if value is not ABSENT:
                lent = put(tree, key, value) is None or lent
    return lent


def _written(tree: dict[Any, Any], key: str) -> bool:
    """Whether `key` has a value of its own, rather than a reference to another spelling of itself."""
    value = find(tree, key)
    itself = isinstance(value, str) and any(other in REFERENCE.findall(value) for other in _spellings(key))
    return value is not ABSENT and not itself


def _spellings(key: str) -> list[str]:
    """All places of a setting, today's first."""
    today = next((today for older, today in SPELLINGS if key == older), key)
    return [today, *(older for older, place in SPELLINGS if place == today)]


def _defaults() -> dict[str, Any]:
    values = Config.model_validate({"model": {"pretrained_model_name_or_path": "-"}}).model_dump()
    del values["model"]["pretrained_model_name_or_path"]
    return values
