"""Nested dictionaries addressed by dotted keys, and their values as a person would write them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

ABSENT: Final = object()  # a key that is not there; null is a value


def find(tree: Mapping[Any, Any], key: str) -> Any:
    """The value at a dotted key, ABSENT where there is none."""
    value: Any = tree
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return ABSENT
        value = value[name]
    return value


def put(tree: dict[Any, Any], key: str, value: Any) -> str | None:
    """Set a dotted key, making sections on the way; if one is there and is no section, its key and nothing set."""
    *sections, name = key.split(".")
    place = tree
    for position, section in enumerate(sections, start=1):
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            return ".".join(sections[:position])
        place = inner
    place[name] = value
    return None


def remove(tree: dict[Any, Any], key: str) -> None:
    """Delete a dotted key, which is there."""
    section, _, name = key.rpartition(".")
    del (find(tree, section) if section else tree)[name]


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree with its dotted key; entries of a list go by the key of the list."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, key)


def only(tree: Any, shape: Any) -> Any:
    """`tree` without the keys that `shape` does not have."""
    if isinstance(tree, dict) and isinstance(shape, dict):
        return {name: only(tree[name], inner) for name, inner in shape.items()}
    return tree


def shown(value: Any) -> str:
    """A value as the person would write it: true, null, 'text', [1, 2], {"lr": 0.0001}."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
