"""Problems of a configuration in words: unknown keys with the nearest known one, values with what is allowed."""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qwen_image_finetune.config.data import OUR_DATASETS, DatasetArguments
from qwen_image_finetune.config.root import Config
from qwen_image_finetune.config.tree import find, shown
from qwen_image_finetune.config.values import Allowed, Section

WRONG_SECTION = 2  # a key of this name in another section counts as two letters away

# What other trainers (ai-toolkit, musubi-tuner) call a key of ours, in whatever section: nearer than any spelling.
ELSEWHERE = {
    "steps": "train.max_train_steps",
    "epochs": "train.num_epochs",
    "max_train_epochs": "train.num_epochs",
    "learning_rate": "optimizer.init_args.lr",
    "network": "model.lora",
    **dict.fromkeys(("rank", "linear", "network_dim"), "model.lora.r"),
    **dict.fromkeys(("alpha", "linear_alpha", "network_alpha"), "model.lora.lora_alpha"),
    **dict.fromkeys(("save", "save_every", "save_every_n_steps"), "train.checkpointing_steps"),
    "name_or_path": "model.pretrained_model_name_or_path",
    "base_weights": "model.base_loras",
    **dict.fromkeys(("datasets", "folder_path"), "data.init_args.dataset_path"),
    # The later style of the framework that the guide comes from.
    "resume": "train.resume_from_checkpoint",
    "trainer": "train.trainer",
    "dit": "predict.devices.transformer",
    "sampling": "validation",
    "repo_id": "data.init_args.dataset_path",
}
# Keys of that style that stand for several of ours, or for none.
OTHERWISE = {
    "cache.devices": "name them one by one: cache.vae_encoder_device, cache.text_encoder_device and "
    "cache.text_encoder_2_device",
    "fit_device": "a run takes the first card that it sees; choose it with CUDA_VISIBLE_DEVICES",
}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, LoraConfig for ``LoraConfig | None``; None for a plain value."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((member for member in members if isinstance(member, type) and issubclass(member, Section)), None)


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key below `model` with its declaration, dotted, sections before their keys."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if (section := section_of(field.annotation)) is not None:
            yield from fields(section, f"{prefix}{name}.")


@cache
def known_keys() -> dict[str, FieldInfo]:
    """Every key of a configuration, dotted, with its declaration."""
    return dict(fields())


def allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a type takes, in words."""
    for mark in metadata:
        if isinstance(mark, Allowed):
            return mark.words
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0], arguments[1:])
    if origin is Literal:
        *first, last = (f'"{choice}"' for choice in arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(member) for member in arguments)
    if origin is list:
        return f"list of {allowed(arguments[0])}"
    if section_of(annotation) is not None:
        return "section"
    return {type(None): "null", dict: "section"}[origin or annotation]


def take_unknown(tree: dict[Any, Any], model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Remove every key of `tree` that the schema does not have; their dotted names, the outermost of each branch."""
    found = []
    for name, value in list(tree.items()):
        if name not in model.model_fields:
            found.append(f"{prefix}{name}")
            del tree[name]
        elif isinstance(value, dict) and (section := section_of(model.model_fields[name].annotation)) is not None:
            own_class = section is DatasetArguments and tree.get("class_path", OUR_DATASETS[0]) not in OUR_DATASETS
            if not own_class:  # a class of the user's own has arguments that we do not know
                found += take_unknown(value, section, f"{prefix}{name}.")
    return found


def unknown(key: str) -> str:
    """The sentence about a key that is not one."""
    for name, words in OTHERWISE.items():
        if f".{key}".endswith(f".{name}"):
            return f"{key!r} is not a key; {words}"
    candidates = nearest(key)
    if candidates == [key]:  # "train.num_epochs: 3" on one line
        outer, _, inner = key.rpartition(".")
        return f"{key!r} is written with a dot; nest {inner!r} under {outer!r}"
    if not candidates:
        section = key.rpartition(".")[0]
        inside = [known for known in known_keys() if known.rpartition(".")[0] == section]
        return f"{key!r} is not a key; {section or 'the configuration'} has {', '.join(inside)}"
    names = " or ".join(repr(candidate) for candidate in candidates)
    return f"{key!r} is not a key; the nearest is {names}"


def nearest(key: str) -> list[str]:
    """The known keys least far from `key`, at most three; none if all are far."""
    leaf = key.rpartition(".")[2]
    if leaf in ELSEWHERE and key not in known_keys():
        return [ELSEWHERE[leaf]]
    distances = {}
    for known in (*known_keys(), "optimizer.init_args.lr"):
        known_leaf = known.rpartition(".")[2]
        elsewhere = distance(leaf.lower(), known_leaf.lower()) + WRONG_SECTION
        if elsewhere > WRONG_SECTION and min(len(leaf), len(known_leaf)) < 4:
            elsewhere = len(key)  # short names are close to every other short name
        distances[known] = min(distance(key.lower(), known.lower()), elsewhere)
    least = min(distances.values())
    if least > max(2, len(leaf) // 3 + 1):
        return []
    return [known for known, far in distances.items() if far == least][:3]


def no_folder(folder: Path) -> str:
    """That `folder` is not there: the place that was looked in, and what may have been meant."""
    place = folder.absolute()
    there = next(above for above in place.parents if os.path.isdir(above))
    wanted = place.relative_to(there).parts[0]
    inside = os.listdir(there) if os.access(there, os.R_OK) else []
    names = sorted(name for name in inside if os.path.isdir(there / name) and not name.startswith("."))
    close = difflib.get_close_matches(wanted, names, n=1)
    if close:
        return f"no folder {place}; did you mean {there / close[0]}?"
    return f"no folder {place}; {there} holds {', '.join(names[:8]) or 'no folders'}{', ...' if len(names) > 8 else ''}"


def distance(first: str, second: str) -> int:
    """Letters to insert, delete, replace or swap with their neighbour until `first` is `second`."""
    before: list[int] = []
    last = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        line = [row]
        for column, other in enumerate(second, start=1):
            cost = min(last[column] + 1, line[-1] + 1, last[column - 1] + (letter != other))
            if row > 1 and column > 1 and letter == second[column - 2] and first[row - 2] == other:
                cost = min(cost, before[column - 2] + 1)
            line.append(cost)
        before, last = last, line
    return last[-1]


def problems(error: ValidationError, tree: Mapping[str, Any]) -> list[str]:
    """One line for each key that pydantic refuses; its own errors have one for each member of a union."""
    lines: dict[str, None] = {}
    details = error.errors(include_url=False)
    explained = [_locate(detail["loc"])[0] for detail in details if detail["type"] == "value_error"]
    for detail in details:
        key, field = _locate(detail["loc"])
        if (line := _in_entry(detail["loc"], detail["type"], tree)) is not None:
            lines.update({line: None} if line else {})
        elif detail["type"] == "value_error":  # our own validators name their keys themselves
            lines.update(dict.fromkeys(str(detail["ctx"]["error"]).splitlines()))
        elif key in explained or detail["type"] == "default_factory_not_called":
            continue  # said already: another member of a union, or a default that hangs on a refused key
        elif detail["type"] == "missing":
            lines[f"{key} is missing: {field.description}"] = None
        elif detail["type"] == "extra_forbidden":
            lines[unknown(".".join(str(part) for part in detail["loc"]))] = None
        else:
            lines[f"{key}={shown(find(tree, key))} is refused; allowed: {_wanted(field)}{_hint(tree, key)}"] = None
    return list(lines)


def _in_entry(location: Sequence[int | str], kind: str, tree: Mapping[str, Any]) -> str | None:
    """The line about an entry of a list of sections, such as validation.samples; None about anything else.

    "" where it is not worth one: of an entry that is a section, the errors of what else it might have been.
    """
    key, field = _locate(location)
    section, given = _listed_section(field.annotation), find(tree, key)
    if section is None or not isinstance(given, list) or kind == "value_error":
        return None  # our own validators name their keys themselves
    numbers = [place for place, part in enumerate(location) if isinstance(part, int)]
    if not numbers:  # that the list is no text
        return "" if any(isinstance(entry, dict) for entry in given) else None
    number, *inside = location[numbers[0] :]
    entry = given[int(number)]
    plain = _plain_entries(field.annotation)
    if not isinstance(entry, dict):
        return f"{key}[{number}]={shown(entry)} is refused; allowed: {plain}a section with {_keys_of(section)}"
    name, known = f"{key}[{number}]", None
    value: Any = entry
    for part in map(str, inside):
        if section is None or not isinstance(value, dict) or (part not in section.model_fields and part not in value):
            continue  # a member of a union
        if part not in section.model_fields:
            return f"'{name}.{part}' is not a key; {name} has {_keys_of(section)}{_hint(tree, key)}"
        name, value, known = f"{name}.{part}", value.get(part), section.model_fields[part]
        section = section_of(known.annotation)
    if known is None:
        return ""
    if kind == "missing":
        return f"{name} is missing: {known.description}"
    return f"{name}={shown(value)} is refused; allowed: {allowed(known.annotation, known.metadata)}"


def _keys_of(section: type[Section]) -> str:
    return ", ".join(section.model_fields)


def _listed_section(annotation: Any) -> type[Section] | None:
    """The section that entries of a list may be, DataEntry for ``Text | list[Text | DataEntry]``."""
    if get_origin(annotation) is list:
        member = get_args(annotation)[0]
        return section_of(member)
    found = (_listed_section(member) for member in get_args(annotation) if not isinstance(member, str))
    return next((one for one in found if one is not None), None)


def _plain_entries(annotation: Any) -> str:
    """ "a text, or " where entries of the list may be that as well."""
    if get_origin(annotation) is list:
        member = get_args(annotation)[0]
        return "" if section_of(member) is member else "a text, or "
    return next((one for member in get_args(annotation) if (one := _plain_entries(member))), "")


def _hint(tree: Mapping[str, Any], key: str) -> str:
    """What to do with a data set that is named by its place on the hub."""
    value = find(tree, key)
    entries = value if isinstance(value, list) else [value]
    names = [entry["repo_id"] for entry in entries if isinstance(entry, dict) and "repo_id" in entry]
    if not key.endswith("dataset_path") or not names:
        return ""
    return f"; load it first (hf download {names[0]} --repo-type dataset --local-dir FOLDER) and give the folder"


def _wanted(field: FieldInfo) -> str:
    if (section := section_of(field.annotation)) is not None:
        return f"a section with keys of {', '.join(section.model_fields)}"
    return allowed(field.annotation, field.metadata)


def _locate(location: Sequence[int | str]) -> tuple[str, FieldInfo]:
    """The key an error is about; positions in lists and members of unions come after it and are dropped."""
    model: type[BaseModel] | None = Config
    names: list[str] = []
    field = FieldInfo(annotation=Config)
    for part in location:
        if model is None or not isinstance(part, str) or part not in model.model_fields:
            continue
        names.append(part)
        field = model.model_fields[part]
        model = section_of(field.annotation)
    return ".".join(names), field
