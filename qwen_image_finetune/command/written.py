"""A configuration as a person would write it: what differs from the defaults, a section a line or a key a line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_image_finetune.config import Config
from qwen_image_finetune.config.tree import find, put

REQUIRED = "model.pretrained_model_name_or_path"
ALWAYS = (REQUIRED, "data.init_args.dataset_path", "optimizer.init_args.lr")  # what a person looks for, default or not
SPREAD = ("model", "train")  # sections with a line for each key; the others take one


def written(values: Mapping[str, Any], comments: Mapping[str, str]) -> Iterator[str]:
    """The lines of a file with these dotted keys, each with its comment where it has one."""
    told = [key for key in values if key in ALWAYS or not _is_default(key, values[key])]
    for section, keys in itertools.groupby(sorted(told, key=_place), key=lambda key: key.partition(".")[0]):
        group = list(keys)
        said = [comments.get(key, "") for key in group]
        tree = nested({key.partition(".")[2]: values[key] for key in group})
        if section not in SPREAD:
            yield _line(f"{section}: {_flow(tree)}", "; ".join(filter(None, said)))
            continue
        yield f"{section}:"
        for (name, value), comment in zip(tree.items(), said, strict=False):
            yield _line(f"  {name}: {_flow(value)}", comment)


def as_config(values: Mapping[str, Any]) -> Config:
    """Dotted keys as a configuration."""
    return Config.model_validate(nested(values))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections within sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        put(tree, key, value)
    return tree


def _line(words: str, comment: str) -> str:
    return f"{words}  # {comment}" if comment else words


def _flow(value: Any) -> str:
    """A value on one line; the names of keys need no quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _is_default(key: str, value: Any) -> bool:
    """Whether a configuration without the key says the same."""
    return bool(find(as_config({REQUIRED: "any"}).model_dump(mode="json"), key) == value)


def _place(key: str) -> tuple[Sequence[int | str], ...]:
    order = list(Config.model_fields)
    section, *rest = key.split(".")
    return (order.index(section),), *((int(depth == 0 and len(rest) > 1), part) for depth, part in enumerate(rest))
