"""The form of a run, made from the declarations of the configuration, so that the two cannot drift apart.

A draft is YAML text. The form shows what it says, an edit in the form changes the text; what is wrong is said at a key.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qwen_image_finetune.config import OUR_DATASETS, Config, ConfigError, load_config
from qwen_image_finetune.config.text import parse_mapping
from qwen_image_finetune.config.tree import ABSENT, find, put, remove, shown, texts
from qwen_image_finetune.config.words import allowed, known_keys, section_of
from qwen_image_finetune.judging.pages.reading import flat
from qwen_image_finetune.studio.shelf import Refused, Shelf

LONGEST_DRAFT = 100_000  # characters
RATE = "optimizer.init_args.lr"  # no key of its own: the optimizer's argument
# Optimizers that a run may be given here; a terminal takes any.
OPTIMIZERS = (
    "torch.optim.AdamW",
    "torch.optim.Adam",
    "torch.optim.SGD",
    "torch.optim.Adafactor",
    "transformers.optimization.Adafactor",
    "torch.optim.Muon",
    "bitsandbytes.optim.AdamW8bit",
    "bitsandbytes.optim.Adam8bit",
    "bitsandbytes.optim.PagedAdamW8bit",
    "bitsandbytes.optim.Lion8bit",
    "bitsandbytes.optim.AdEMAMix8bit",
    "prodigyopt.Prodigy",
    "pytorch_optimizer.Lion",
    "pytorch_optimizer.CAME",
    "pytorch_optimizer.Muon",
    "schedulefree.AdamWScheduleFree",
)

# The keys that matter, in the order of the form: what they are called there, and what to know about them.
FRONT: dict[str, tuple[str, str]] = {
    "logging.tracker_project_name": ("Name of the run", "Its results go to a folder of this name."),
    "model.pretrained_model_name_or_path": ("Model", "A model in this folder, or one on the hub: owner/name."),
    "data.init_args.dataset_path": ("Pictures", "The data set that is learnt from."),
    "data.init_args.resolution": ("Picture size, pixels", "Side of a square of the same area. Empty: the model's own."),
    "train.max_train_steps": ("Length, steps", "A few hundred to a few thousand; one step learns from one batch."),
    "data.batch_size": ("Pairs a step", "More is steadier, slower, and takes more memory."),
    RATE: ("Learning rate", "How far each step goes. 1e-4 suits a LoRA of a full-size model."),
    "model.lora.r": ("Size of the LoRA (rank)", "16 is plenty for most edits; more can hold more."),
    "validation.enabled": ("Draw samples on the way", "Also measures whether it helps pictures it has not seen."),
    "validation.share": ("Share kept aside for testing", "0.1 keeps every tenth pair out of the training."),
    "validation.steps": ("Steps between samples", ""),
    "train.checkpointing_steps": ("Steps between saved versions", "The end is saved in any case."),
    "model.quantize": ("Smaller base model", "fp8 halves the memory of the base; nf4 quarters it."),
    "train.gradient_checkpointing": ("Save memory, take longer", "Computes a part twice instead of keeping it."),
    "cache.use_cache": ("Prepare the pictures once", "Faster, and the card has more room; needs some disk."),
}


class _Dumper(yaml.SafeDumper):
    """Lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)

Kind = Literal["switch", "choice", "number", "text", "yaml"]


@dataclass(frozen=True)
class Knob:
    """One key of the configuration, as a field of the form."""

    key: str
    label: str
    meaning: str
    kind: Kind
    choices: tuple[str, ...]
    default: str  # what it is when nothing is written
    allowed: str
    nullable: bool


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with which keys; none where it is about the whole."""

    words: str
    keys: list[str]


@dataclass(frozen=True)
class Checked:
    """What a draft says."""

    text: str
    values: dict[str, str]  # what is written, by key
    problems: list[Problem]
    notes: list[str] = field(default_factory=list)
    config: Config | None = None  # where nothing is wrong

    def told(self) -> dict[str, Any]:
        """For the page."""
        return {
            "yaml": self.text,
            "values": self.values,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": self.notes,
        }


@cache
def knobs() -> list[Knob]:
    """Every key of the configuration that is no section, those of `FRONT` among them."""
    found = [_knob(key, about) for key, about in known_keys().items() if section_of(about.annotation) is None]
    rate = Knob(RATE, *FRONT[RATE], "number", (), "0.0001 with AdamW", "number above 0", False)
    return [*found, rate]


def _knob(key: str, about: FieldInfo) -> Knob:
    label, meaning = FRONT.get(key, (key, about.description or ""))
    members = list(_members(about.annotation))
    literals = [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    nullable = NoneType in members
    plain = [member for member in members if member is not NoneType and get_origin(member) is not Literal]
    kind: Kind
    if bool in plain and len(plain) == 1:
        kind, choices = ("choice" if literals else "switch"), ("true", "false", *literals)
    elif not plain:
        kind, choices = "choice", tuple(literals)
    elif all(member in (int, float) for member in plain) and not literals:
        kind, choices = "number", ()
    elif plain == [str] and not literals:
        kind, choices = "text", ()
    else:
        kind, choices = "yaml", tuple(literals)
    default = about.get_default(call_default_factory=True, validated_data={"class_path": OPTIMIZERS[0]})
    said = "" if about.is_required() or default is PydanticUndefined else shown(default).strip("'")
    return Knob(key, label, meaning, kind, choices, said, allowed(about.annotation, about.metadata), nullable)


def _members(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation is made of; a list counts as one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def check(text: str, shelf: Shelf) -> Checked:
    """Read a draft. Loads, imports and downloads nothing."""
    if len(text) > LONGEST_DRAFT:
        raise Refused(f"a configuration has at most {LONGEST_DRAFT:,} characters")
    try:
        tree: Any = OmegaConf.to_container(parse_mapping(text, "the configuration"))
    except ConfigError as error:
        return Checked(text, {}, [Problem(str(error), [])])
    values = {key: written(found) for key in _shown_keys() if (found := find(tree, key)) is not ABSENT}
    problems = [Problem(words, keys_in(words)) for words in _refused(tree, shelf)]
    config = None
    try:
        config = _load(text, shelf)
    except ConfigError as error:
        problems += [Problem(line, keys_in(line)) for line in _lines(str(error))]
    notes = [] if config is None else list(config.notes)
    if config is not None:  # once more, with what interpolation has made of it
        resolved = _refused(config.model_dump(mode="json"), shelf)
        problems += [Problem(line, keys_in(line)) for line in resolved if line not in [each.words for each in problems]]
    return Checked(text, values, problems, notes, config if not problems else None)


def edited(text: str, key: str, value: str) -> str:
    """The draft with another value of a key; an empty one takes the key out.

    Raises:
        Refused: the value cannot be read, or the key has no place in this draft.
    """
    if key not in _shown_keys():
        raise Refused(f"{key} is not a key of the configuration")
    try:
        tree: Any = OmegaConf.to_container(parse_mapping(text, "the configuration"))
        if value.strip() == "":
            if find(tree, key) is not ABSENT:
                remove(tree, key)
        else:
            new: Any = value.strip()
            if key not in _text_keys():
                new = OmegaConf.to_container(parse_mapping(f"value: {new}", key))
                new = new["value"] if isinstance(new, dict) else new
            if (obstacle := put(tree, key, new)) is not None:
                raise Refused(f"{obstacle} is no section here, so {key} has no place")
    except ConfigError as error:
        raise Refused(str(error)) from error
    return as_yaml(tree)


def as_yaml(tree: dict[str, Any]) -> str:
    """A tree as a person would write it; sections with nothing in them are left out."""
    return yaml.dump(_pruned(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def away_from_defaults(text: str) -> str:
    """A configuration with every default written out, as a run keeps it, without those; what cannot be read stays."""
    try:
        tree: Any = OmegaConf.to_container(parse_mapping(text, "the configuration"))
    except ConfigError:
        return text
    remove_keys = ("train.resume_from_checkpoint",)
    for key in known_keys():
        value = find(tree, key)
        if (
            value is not ABSENT
            and not isinstance(value, dict)
            and (value == _defaults().get(key, ABSENT) or key in remove_keys)
        ):
            remove(tree, key)
    return as_yaml(tree)


def changed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings away from their defaults, by dotted key."""
    return {key: value for key, value in settings.items() if value != _defaults().get(key, ABSENT)}


@cache
def _defaults() -> dict[str, Any]:
    """What every key is when nothing is written."""
    config = Config.model_validate({"model": {"pretrained_model_name_or_path": "none"}})
    return {
        key: value
        for key, value in flat(config.model_dump(mode="json")).items()
        if not key.startswith("model.pretrained")
    }


def draft(model: str, data_set: str, name: str) -> str:
    """A configuration to start from."""
    return as_yaml(
        {
            "logging": {"tracker_project_name": name, "output_dir": "output"},
            "model": {"pretrained_model_name_or_path": model, "lora": {"r": 16, "lora_alpha": 16}},
            "data": {"init_args": {"dataset_path": data_set}, "batch_size": 1},
            "train": {"max_train_steps": 1000, "checkpointing_steps": 250, "gradient_checkpointing": True},
            "optimizer": {"init_args": {"lr": 0.0001}},
            "cache": {"use_cache": True, "cache_dir": "cache"},
            "validation": {"enabled": True, "share": 0.1, "steps": 250},
        }
    )


def written(value: Any) -> str:
    """A value as the form shows it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def keys_in(line: str) -> list[str]:
    """The keys that a sentence names."""
    found = re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)+", line)
    return list(dict.fromkeys(key for key in found if key in known_keys() or key == RATE))


def _shown_keys() -> list[str]:
    return [knob.key for knob in knobs()]


def _text_keys() -> set[str]:
    return {knob.key for knob in knobs() if knob.kind == "text"}


def _refused(tree: Any, shelf: Shelf) -> list[str]:
    """What a run that is started from a page may not have: classes that are imported by name, places outside."""
    lines = []
    for key, text in texts(tree):
        name = key.rpartition(".")[2]
        if name == "class_path":
            known = OUR_DATASETS if key == "data.class_path" else OPTIMIZERS if key == "optimizer.class_path" else ()
            if text not in known:
                lines.append(f"{key}={text} can be used from a terminal only; here: {', '.join(known) or 'nothing'}")
        elif not _stays(text, shelf):
            lines.append(f"{key}={text!r} leads out of {shelf.root}: only what lies in there is used")
    return lines


def _stays(text: str, shelf: Shelf) -> bool:
    """Whether a text, taken for a path, stays on the shelf. Most texts are none, and stay as well."""
    if text.startswith("~"):
        return False
    try:
        place = (shelf.root / text).resolve()
    except (OSError, ValueError):  # no path at all: too long, or with a NUL
        return "\0" not in text
    return place.is_relative_to(shelf.root)


def _load(text: str, shelf: Shelf) -> Config:
    """The checked configuration. It is read from a file, and relative to the shelf, as the run will read it."""
    shelf.own.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shelf.own, prefix="draft-") as folder:
        path = Path(folder, "draft.yaml")
        path.write_text(text, encoding="utf-8")
        try:
            return load_config(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), "the configuration")) from error


def _lines(message: str) -> list[str]:
    first, *rest = message.splitlines()
    return [line.strip() for line in rest] or [first.removeprefix("the configuration: ")]


def _pruned(tree: dict[str, Any]) -> dict[str, Any]:
    pruned = {key: _pruned(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in pruned.items() if value != {}}
