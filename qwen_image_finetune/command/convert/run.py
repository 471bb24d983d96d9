"""From the file of another trainer to a configuration of ours, and its pairs where our reader finds them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from omegaconf import OmegaConf

from qwen_image_finetune.command.convert import ai_toolkit, musubi, onetrainer, qflux, simpletuner
from qwen_image_finetune.command.convert.ledger import ConvertError, Ledger
from qwen_image_finetune.command.convert.pairs import Folder, in_place, lay_out
from qwen_image_finetune.command.convert.terms import common, found
from qwen_image_finetune.command.written import REQUIRED, written
from qwen_image_finetune.config import ConfigError, load_config
from qwen_image_finetune.config.interpolation import resolve
from qwen_image_finetune.config.text import read_yaml
from qwen_image_finetune.disk.files import staged_file
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.disk.reading import MEBIBYTE, Unreadable, read_regular
from qwen_image_finetune.machine.console import say

DATASET = "data.init_args.dataset_path"
LARGEST = 16 * MEBIBYTE  # of a file of theirs
MODULES = {"networks.lora_flux": "flux_kontext", "networks.lora_qwen_image": "qwen_image",
           "networks.lora_flux_2": "flux_2"}  # fmt: skip
OF_ALL_OR_ONE = ("image_size", "resolution", "caption_dropout_rate")  # keys of data.init_args and of an entry
OF_ALL = ("random_flip", "random_crop", "center_crop")  # keys of data.init_args alone

Project: TypeAlias = tuple[str, Ledger, list[Folder]]  # which program's, its keys, its data sets


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    file: Path
    output: Path
    pairs: Path | None
    model: str | None
    overwrite: bool


def convert(request: Request) -> dict[str, Any]:
    """Read a project, say what becomes of each of its keys, and write the configuration; what was said, as data.

    Raises:
        ConvertError: the file is of none of the programs, or asks for what is not here. Nothing is written.
        OutputError: an output is there already.
    """
    home = request.pairs or request.output.with_name(f"{request.output.stem}_pairs")
    check_output(request.output, request.overwrite)
    program, ledger, folders = read(request.file, request.model)
    if request.model is not None:
        ledger.values[REQUIRED] = request.model
        ledger.values.pop("train.trainer", None)  # of the model that it replaces
    there_already = [in_place(folder.pairs) for folder in folders]
    places = [there or home / _name(folder, number) for number, (there, folder) in
              enumerate(zip(there_already, folders, strict=True))]  # fmt: skip
    if REQUIRED not in ledger.values:
        raise ConvertError(f"{request.file} names no model: give it, such as --model Qwen/Qwen-Image-Edit")
    said = _settle(ledger, folders, places)
    ledger.close()
    for there, place in zip(there_already, places, strict=True):
        if there is None:
            check_output(place, request.overwrite, folder=True)
    head = f"# Written by `qif convert` from {request.file.name} of {program}. Keys: docs/configuration.md."
    lines = [head, *written(ledger.values, {})]
    _write(request.output, "\n".join(lines) + "\n")
    for folder, there, place in zip(folders, there_already, places, strict=True):
        said += [f"{folder.key}: {line}" for line in folder.left_out]
        if there is not None:
            said.append(f"{folder.key}: {len(folder.pairs)} pairs, read where they are: {there}")
        elif folder.pairs:
            said.append(f"{folder.key}: {len(folder.pairs)} pairs, laid out in {place}: "
                        f"{lay_out(place, folder.pairs, folder.root)}")  # fmt: skip
        else:
            said.append(f"{folder.key}: no pairs are there ({folder.root}); convert again where they are")
    for line in [*map(str, ledger.lines), *said]:
        say(line)
    lost = sum(line.lost for line in ledger.lines)
    say(f"{request.output}: {len(ledger.lines)} keys of {program}, {lost} without a counterpart")
    keys = [{"theirs": line.theirs, "value": line.value, "ours": dict(line.ours), "words": line.words,
             "lost": line.lost} for line in ledger.lines]  # fmt: skip
    return {"program": program, "output": str(request.output), "keys": keys, "data": said}


def read(file: Path, model: str | None) -> Project:
    """Which program a file is of, with its keys and its data sets.

    Raises:
        ConvertError: of none, or it cannot be read.
        ConfigError: it is YAML that cannot be read.
    """
    text = _text(file)
    if file.suffix.lower() in (".yaml", ".yml"):
        return _yaml(file)
    if file.suffix.lower() == ".json":
        return _json(file, text)
    if file.suffix.lower() == ".toml":
        tree = _toml(text, file)
        if "datasets" in tree:
            return "musubi-tuner", *musubi.read_data(tree, file)
        sections = [value for value in tree.values() if isinstance(value, dict)]
        options = {name: value for name, value in tree.items() if not isinstance(value, dict)}
        for section in sections:
            options |= section
        script = f"{MODULES.get(str(options.get('network_module')), '')}_train_network.py"
    else:
        try:
            options, script = musubi.options_in(text)
        except ConvertError as error:
            raise ConvertError(f"{file}: {error}") from error
        if "config_file" in options:
            named = _named(file, str(options["config_file"]).removesuffix(".toml") + ".toml")
            for value in (deeper := _toml(_text(named), named)).values():
                options = {**(value if isinstance(value, dict) else {}), **options}
            options = {**{name: value for name, value in deeper.items() if not isinstance(value, dict)}, **options}
    if "dataset_config" not in options:
        raise ConvertError(f"{file}: it has no dataset_config, which names the pairs")
    data = _named(file, str(options["dataset_config"]))
    if model is not None and not script.startswith(tuple(MODULES.values())):
        script = "flux_kontext_train_network.py"  # --model says which
    return "musubi-tuner", *musubi.read_options(options, file, script, _toml(_text(data), data))


def _yaml(file: Path) -> Project:
    tree: Any = OmegaConf.to_container(read_yaml(file))
    if isinstance(tree.get("config"), dict) and "process" in tree["config"]:
        return "ai-toolkit", *ai_toolkit.read(tree, file)
    if "data" in tree and ("model" in tree or "trainer" in tree):
        return "qflux", *qflux.read(resolve(tree, str(file)), file)
    raise _unknown(file)


def _json(file: Path, text: str) -> Project:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{file} is no JSON: {error}") from error
    if isinstance(tree, list):
        raise ConvertError(f"{file} lists data sets: give the configuration that names it (config.json)")
    names = {str(name).lstrip("-") for name in tree} if isinstance(tree, Mapping) else set()
    readers: dict[str, Callable[[Mapping[str, Any], Path], tuple[Ledger, list[Folder]]]] = {
        "model_family": simpletuner.read, "training_method": onetrainer.read,
    }  # fmt: skip
    for name, reader in readers.items():
        if name in names:
            return "SimpleTuner" if name == "model_family" else "OneTrainer", *reader(tree, file)
    raise _unknown(file)


def _unknown(file: Path) -> ConvertError:
    return ConvertError(
        f"{file} is not known as a file of ai-toolkit (YAML), musubi-tuner (TOML, or a script with its command), "
        "SimpleTuner or OneTrainer (JSON) or qflux (YAML)"
    )


def _toml(text: str, file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConvertError(f"{file} is no TOML: {error}") from error


def _text(file: Path) -> str:
    try:
        return read_regular(file, LARGEST).decode("utf-8-sig")
    except Unreadable as error:
        raise ConvertError(str(error)) from error
    except UnicodeDecodeError as error:
        raise ConvertError(f"{file} is not text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ConvertError(f"{file}: {error.strerror}") from error


def _named(file: Path, name: str) -> Path:
    return found(name, file) or Path(name).expanduser()


def _name(folder: Folder, number: int) -> str:
    return f"{number + 1}_{folder.root.name}" if number else folder.root.name or "pairs"


def _settle(ledger: Ledger, folders: list[Folder], places: list[Path]) -> list[str]:
    """Put the data sets among our keys; what a data set has of its own, and what it cannot have here, is said."""
    names = dict.fromkeys(name for folder in folders for name in folder.settings)
    given = [folder.settings for folder in folders]
    alike = {name: common(list(given), name) for name in (*OF_ALL_OR_ONE, *OF_ALL) if name in names}
    said, entries = list[str](), list[dict[str, Any]]()
    shares, why = _shares(folders, bool(ledger.on_hub))
    said += why
    for folder, place, share in zip(folders, places, shares, strict=True):
        own = {name: value for name, value in folder.settings.items()
               if name not in OF_ALL and alike.get(name) is None and value is not None}  # fmt: skip
        entries.append({"path": str(place), **own, **share})
        said += [f"{name}: {value} of {folder.key}  ->  {name}: {value} of {place}"
                 for name, value in (own | share).items()]  # fmt: skip
    every = [*(entry if len(entry) > 1 else entry["path"] for entry in entries), *ledger.on_hub]
    if not every:
        return []
    ledger.values[DATASET] = every[0] if len(every) == 1 and isinstance(every[0], str) else every
    for name, value in alike.items():
        if value is not None:
            ledger.values[f"data.init_args.{name}"] = value
            said.append(f"{name}: {value}  ->  data.init_args.{name}: {value}")
        elif name in OF_ALL:
            each = ", ".join(str(settings.get(name, False)) for settings in given)
            said.append(f"{name}: {each}  ->  no counterpart; data.init_args.{name} is of all data sets, and stays off")
    return said


def _shares(folders: Sequence[Folder], on_hub: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """How often each data set is visited: `repeats` where they are whole and that is all, else `weight`; and what to
    say of it.

    Args:
        on_hub: whether there are others, whose pairs were not counted.
    """
    shares = [folder.share for folder in folders]
    if all(share is None for share in shares) and all(folder.visits == int(folder.visits) > 0 for folder in folders):
        return [{"repeats": int(folder.visits)} if folder.visits != 1 else {} for folder in folders], []
    visits = [len(folder.pairs) * folder.visits if share is None else share for folder, share in
              zip(folders, shares, strict=True)]  # fmt: skip
    each = ", ".join(f"{number:g} of {folder.key}" for number, folder in zip(visits, folders, strict=True))
    if on_hub:
        return [{} for _ in folders], [
            f"visits: {each}  ->  no counterpart; with data sets of the hub, whose pairs are not counted here, give "
            "each entry a weight, its share of all visits (docs/data.md)"
        ]
    if len(folders) == 1 or not all(visits):
        return [{} for _ in folders], [f"visits: {each}  ->  no counterpart; each pair is visited once in an epoch"]
    counted = "" if any(share is not None for share in shares) else f", {sum(visits):g} there"
    return [{"weight": round(number, 6)} for number in visits], [
        f"an epoch has as many visits as there are pairs here, {sum(len(folder.pairs) for folder in folders)}{counted}"
    ]


def _write(output: Path, text: str) -> None:
    with staged_file(output) as staged:
        staged.write_text(text, encoding="utf-8")
        try:
            load_config(staged)
        except ConfigError as error:
            raise ConvertError(str(error).replace(str(staged), str(output))) from error
