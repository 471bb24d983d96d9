"""``${section.key}`` in a configuration: resolved by OmegaConf, from the file, other spellings and the defaults."""

from __future__ import annotations

import copy
import re
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen_image_finetune.config.root import Config
from qwen_image_finetune.config.schema import ConfigError
from qwen_image_finetune.config.spellings import SPELLINGS
from qwen_image_finetune.config.text import omegaconf_words
from qwen_image_finetune.config.tree import ABSENT, find, only, put, shown, texts

MOST_TEXT = 100_000  # characters of a value, once its references are written out
REFERENCE = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*\}")


def resolve(tree: dict[Any, Any], source: str) -> dict[Any, Any]:
    """`tree` with every interpolation replaced by what it stands for.

    Raises:
        ConfigError: a reference to nothing or to itself, or a call such as ``${oc.env:HOME}``.
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
    _check_growth(lent, source)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(lent), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_words(error, source)) from error
    return cast(dict[Any, Any], only(resolved, tree))


def _check_growth(tree: dict[Any, Any], source: str) -> None:
    """Refuse references to references that would write out more than anybody means.

    Raises:
        ConfigError: names a key and how much it would be.
    """
    sizes: dict[str, int] = {}

    def size(key: str) -> int:
        if key not in sizes:
            sizes[key] = 0  # of a reference to itself, which OmegaConf names
            value = find(tree, key)
            below = [text for _, text in texts(value)] if isinstance(value, dict | list) else [value]
            sizes[key] = sum(len(str(text)) + sum(map(size, REFERENCE.findall(str(text)))) for text in below)
        return sizes[key]

    for key, text in texts(tree):
        grown = sum(map(size, REFERENCE.findall(text)))
        if grown > MOST_TEXT:
            raise ConfigError(
                f"{source}: the references of {key} stand for {grown:,} characters; a value may become {MOST_TEXT:,}"
            )


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
