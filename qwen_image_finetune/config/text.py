"""YAML text to an OmegaConf tree. Nothing in it is executed, and it stays small once its aliases are expanded."""

from __future__ import annotations

import io
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen_image_finetune.config.values import ConfigError

LARGEST_FILE = 1_000_000  # bytes; a configuration has a few thousand
MOST_NODES = 10_000  # aliases expanded: a dozen lines of nested ones could otherwise fill the memory
DEEPEST = 32  # levels of nesting
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
Parser = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def read_yaml(path: Path) -> DictConfig:
    """The mapping in the file `path`, interpolations not yet resolved.

    Raises:
        ConfigError: no such file, unreadable, empty, TOML, not YAML, not a mapping, or YAML with tags.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.suffix.lower() == ".toml":
        raise ConfigError(
            f"{path} is TOML, as kohya's scripts and musubi-tuner read it; a configuration of this program is YAML: "
            "`qif convert` turns one into the other; docs/configuration.md has every key"
        )
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ConfigError(f"{path} has {size} bytes; a configuration has at most {LARGEST_FILE}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return parse_mapping(text, str(path))


def parse_mapping(text: str, source: str) -> DictConfig:
    """The mapping written in `text`.

    Raises:
        ConfigError: naming `source` and the line.
    """
    try:
        if (root := _scan(text, source)) is None:
            raise ConfigError(f"{source} is empty; it needs at least model.pretrained_model_name_or_path")
        if not isinstance(root, yaml.MappingStartEvent):
            raise ConfigError(f"{source} is not a mapping of sections (model:, data:, train:, ...)")
        tree = _built(text, source)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_in_words(error, source)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_words(error, source)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {str(error).splitlines()[0]}") from error
    assert isinstance(tree, DictConfig), type(tree)
    return tree


def _built(text: str, source: str) -> object:
    try:
        return OmegaConf.load(io.StringIO(text))
    except ValueError as error:  # of Python, for a number of thousands of digits or a date that is none
        raise ConfigError(f"{source} has a number or a date that cannot be read: {error}") from error


def _scan(text: str, source: str) -> yaml.Event | None:
    """The event that opens the document, None if there is none; refuses tags, and what would grow without bound.

    Works on the stream of events, before any object is built from it.
    """
    root: yaml.Event | None = None
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes counted when it opened
    sizes: dict[str, int] = {}  # nodes under each finished anchor
    nodes = 0
    for event in yaml.parse(text, Loader=Parser):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"{_place(source, event)}: *{event.anchor} stands for nothing, or for itself")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            root = root or event
            nodes += 1
            if event.tag is not None and event.tag not in PLAIN_TAGS:
                raise ConfigError(
                    f"{_place(source, event)}: the tag {event.tag!r} is refused; a configuration is plain data"
                )
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, nodes - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        if len(open_nodes) > DEEPEST or nodes > MOST_NODES:
            raise ConfigError(
                f"{_place(source, event)}: more than {DEEPEST} levels of nesting, or than {MOST_NODES} values "
                "(aliases expanded), is no configuration"
            )
    return root


def omegaconf_words(error: OmegaConfBaseException, source: str) -> str:
    """One line about an interpolation that cannot be read or resolved."""
    return f"{source}: {error.full_key or 'a value'}: {(error.msg or str(error)).splitlines()[0]}"


def _place(source: str, event: yaml.Event) -> str:
    return source if event.start_mark is None else f"{source}, line {event.start_mark.line + 1}"


def _in_words(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = source if mark is None else f"{source}, line {mark.line + 1}"
    problem = error.problem or error.context or "cannot be read"
    if problem.startswith("found duplicate key "):
        return f"{place}: the key {problem.removeprefix('found duplicate key ')!r} is given twice"
    return f"{place} is not valid YAML: {problem}"
