"""Their keys, one by one, and what became of each: nothing is passed over in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from qwen_image_finetune.config import Config
from qwen_image_finetune.config.tree import ABSENT, put, shown
from qwen_image_finetune.config.words import known_keys, problems

UNKNOWN = "unknown here"


class ConvertError(ValueError):
    """A project that cannot be converted, in words for the person whose it is."""


@dataclass(frozen=True)
class Line:
    """What became of one of their keys."""

    theirs: str  # dotted, places in lists in brackets
    value: Any
    ours: Mapping[str, Any] = field(default_factory=dict)  # keys of ours, dotted, with their values
    words: str = ""
    lost: bool = False  # it has no counterpart

    def __str__(self) -> str:
        became = ", ".join(f"{key}: {shown(value)}" for key, value in self.ours.items())
        if self.lost:
            became = "no counterpart"
        said = f"{became}; {self.words}" if became and self.words else became or self.words
        return f"{self.theirs}: {shown(self.value)}  ->  {said}"


class Ledger:
    """A tree of their keys. Each is taken once, with what became of it; `close` tells of the rest."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._left = dict(leaves(tree))
        self.lines: list[Line] = []
        self.values: dict[str, Any] = {}  # ours, dotted
        self.on_hub: list[dict[str, Any]] = []  # data sets that need not be brought here: entries of dataset_path

    def get(self, key: str, default: Any = None) -> Any:
        """A value that nothing was made of yet; of a key that is not there, or null, `default`."""
        value = self._left.get(key)
        return default if value is None else value

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def below(self, prefix: str) -> list[str]:
        """The keys left that begin with `prefix`."""
        return [key for key in self._left if key.startswith(prefix)]

    def becomes(self, key: str, ours: Mapping[str, Any], words: str = "") -> None:
        """A key that is there has these keys of ours for it; without any, it waits for what is said of it next."""
        if key not in self._left or not ours:
            return
        known = {name: value for name, value in ours.items() if _is_known(name)}
        if not known and self._left[key] is False:
            words = "off"
        self._add(Line(key, self._left.pop(key), known, words, lost=not known and words != "off"))

    def default(self, key: str, value: Any, ours: Mapping[str, Any], words: str = "their default") -> None:
        """A key that is not there means `value` in their program, and something else here."""
        if ours and key not in self._left and not any(name in self.values for name in ours):
            known = {name: each for name, each in ours.items() if _is_known(name)}
            self._add(Line(key, value, known, words, lost=not known))

    def is_so(self, key: str, words: str) -> None:
        """A key that asks for what happens here in any case."""
        if key in self._left:
            self._add(Line(key, self._left.pop(key), {}, words))

    def lost(self, key: str, words: str = "") -> None:
        """A key without a counterpart."""
        if key in self._left:
            self._add(Line(key, self._left.pop(key), {}, words, lost=True))

    def same(self, prefix: str, names: Mapping[str, str]) -> None:
        """Keys whose values mean the same here: theirs below `prefix`, and ours."""
        for name, ours in names.items():
            if (value := self.get(prefix + name)) is not None:
                self.becomes(prefix + name, {ours: value})

    def read(self, key: str, ours: str, words: Mapping[Any, Any] | Callable[[Any], Any], otherwise: str = "") -> None:
        """A key whose value is written otherwise here; where `words` has none for it (None), it has no counterpart."""
        if key not in self:
            return
        value = self.get(key)
        read = words.get(value) if isinstance(words, Mapping) else words(value)
        if read is None:
            self.lost(key, otherwise)
        else:
            self.becomes(key, {ours: read})

    def table(self, prefix: str, words: Mapping[str, str], lost: bool = True) -> None:
        """Keys that are told apart by their names alone, each with its words; what is switched off is not lost."""
        for name, said in words.items():
            for key in [prefix + name, *self.below(f"{prefix}{name}."), *self.below(f"{prefix}{name}[")]:
                off = self._left.get(key) in (False, None, "", [])
                if lost and not off:
                    self.lost(key, said)
                else:
                    self.is_so(key, said or "off")

    def close(self) -> None:
        """Name every key that is left, and take back what the schema refuses, with its reason."""
        for key in list(self._left):
            if self._left[key] is None:
                self.is_so(key, "null: not set")
            else:
                self.lost(key, UNKNOWN)
        while refused := self._refused():
            for name, words in refused.items():
                del self.values[name]
                self.lines = [_without(line, name, words) for line in self.lines]

    def _refused(self) -> dict[str, str]:
        tree: dict[str, Any] = {}
        for name, value in self.values.items():
            put(tree, name, value)
        try:
            Config.model_validate(tree)
        except ValidationError as error:
            said = problems(error, tree)
            found = {name: line for line in said for name in self.values if line.startswith((f"{name}=", f"{name} "))}
            if not found:
                raise ConvertError("what it asks for cannot be trained here: " + "; ".join(said)) from error
            return found
        return {}

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        self.values.update(line.ours)


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key; lists of sections are entered, other lists are values."""
    if isinstance(tree, Mapping) and (tree or not key):
        for name, inner in tree.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif _has_sections(tree):
        for place, inner in enumerate(tree):
            yield from leaves(inner, f"{key}[{place}]")
    else:
        yield key, tree


def _has_sections(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(one, Mapping) for one in value)


def _is_known(name: str) -> bool:
    return name in known_keys() or name.startswith("optimizer.init_args.")


def _without(line: Line, name: str, words: str) -> Line:
    if line.ours.get(name, ABSENT) is ABSENT:
        return line
    ours = {key: value for key, value in line.ours.items() if key != name}
    return Line(line.theirs, line.value, ours, words, lost=not ours)
