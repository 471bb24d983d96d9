"""The shape of the house, kept by walking the source: rooms, light modules, and what no module may do."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = "qwen_image_finetune"

# The rooms from the top floor down: a room imports itself and rooms below. A name stands for a folder or a file.
ROOMS = (
    "src", "cli", "command", "studio", "trainer", "training", "judging", "drawing", "encoding", "fitting", "toy",
    "loading", "families", "levers", "lora", "data", "disk", "machine", "flow", "records", "config", "__init__",
)  # fmt: skip
STRANGERS = frozenset({"families", "levers", "data"})  # axes that multiply: none of them knows another

# Read before a configuration is known to be right, so they load in a moment.
LIGHT = ("cli", "command.cli", "command.arguments", "config", "disk.runs", "disk.files", "families", "records")
HEAVY = frozenset({"torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes"})

CODE_FROM_DATA = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "torch.load": "unpickles; use safetensors",
    "yaml.load": "builds objects; use yaml.safe_load",
    "yaml.load_all": "builds objects; use yaml.safe_load_all",
    "yaml.full_load": "builds objects; use yaml.safe_load",
    "yaml.unsafe_load": "builds objects; use yaml.safe_load",
    "hasattr": "hides a typo; ask for the type, or let it fail",
}


@dataclass(frozen=True)
class Import:
    """One imported module name, with the line that imports it."""

    name: str
    line: int
    runs_at_import: bool  # neither in a function nor under TYPE_CHECKING


def module_name(path: Path, root: Path = ROOT) -> str:
    """`qwen_image_finetune.families.base` of its file; a folder's __init__.py is the folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package and of the door beside it."""
    return {module_name(path): path for folder in (PACKAGE, "src") for path in sorted((ROOT / folder).rglob("*.py"))}


def imports_of(source: str, name: str, is_package: bool = False) -> Iterator[Import]:
    """What the module `name` imports; `from package import submodule` counts as the submodule where there is one."""

    def visit(node: ast.AST, runs: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in modules() else base, node.lineno, runs)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (found for child in node.body for found in visit(child, False))
            yield from (found for child in node.orelse for found in visit(child, runs))
        else:
            runs = runs and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from (found for child in ast.iter_child_nodes(node) for found in visit(child, runs))

    return visit(ast.parse(source), True)


@cache
def imports(name: str) -> tuple[Import, ...]:
    path = modules()[name]
    return tuple(imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py"))


def place(name: str) -> str:
    """The entry of ROOMS that a module belongs to."""
    parts = name.split(".")
    return parts[0] if parts[0] != PACKAGE else parts[1] if len(parts) > 1 else "__init__"


def broken_rule(importer: str, imported: str) -> str | None:
    """Which rule of the rooms this import breaks, if any."""
    room, other = place(importer), place(imported)
    if ROOMS.index(other) < ROOMS.index(room):
        return f"{room} may not import from {other}, which is above it"
    if {room, other} <= STRANGERS and room != other:
        return f"{room} may not know {other}"
    return None


def forbidden_in(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for everything that turns data into code or hides an error."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"imports {name}") for name in names if name.split(".")[0] in CODE_FROM_DATA)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS:
                yield node.lineno, f"{called}: {FORBIDDEN_CALLS[called]}"
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(keyword.value) != "False":
                    yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}: runs what was downloaded"
        elif isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            raises_again = isinstance(node.body[-1], ast.Raise)
            if re.search(r"\b(everything|Exception|BaseException)\b", caught) and not raises_again:
                yield node.lineno, f"catches {caught}: name the errors that are expected"


def where(name: str, line: int) -> str:
    return f"{modules()[name].relative_to(ROOT)}:{line}"


def test_every_module_has_a_room() -> None:
    unplaced = {place(name) for name in modules()} - set(ROOMS)
    assert not unplaced, f"say in ROOMS of {Path(__file__).name} where these belong: {sorted(unplaced)}"
    assert set(ROOMS) == {place(name) for name in modules()}


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")))
def test_room_says_what_is_in_it(room: str) -> None:
    """The first line of its __init__.py is a sentence: a newcomer finds the place for a change from the listing."""
    source = (ROOT / PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(source))
    assert said is not None
    assert said.partition("\n")[0].endswith("."), said


def test_imports_go_down() -> None:
    broken = [
        f"{where(name, found.line)}: {reason}"
        for name in modules()
        for found in imports(name)
        if found.name in modules() and (reason := broken_rule(name, found.name))
    ]
    assert not broken, "\n".join(broken)


def test_no_circles() -> None:
    """Counted are the imports that run when the module is loaded."""
    edges = {
        name: {found.name for found in imports(name) if found.runs_at_import and found.name in modules()} - {name}
        for name in modules()
    }
    circles = []
    for start, first in edges.items():
        reached, waiting = set[str](), list(first)
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting.extend(edges[name])
        if start in reached:
            circles.append(start)
    assert not circles, f"these modules import each other: {circles}"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("command.cli", "training.train", True),
        ("families.base", "records", True),
        ("families.qwen_image_edit", "families.base", True),
        ("training.train", "drawing.predict", True),
        ("levers", "lora.adapters", True),
        ("families", "config.registry", True),
        ("config", "records", False),
        ("encoding.store", "training.train", False),
        ("judging.evaluate", "training.train", False),
        ("judging.evaluate", "trainer", False),
        ("lora.files", "levers.parallel", False),
        ("lora.files", "families.base", False),
        ("config.family", "families", False),
        ("config.family", "families.base", False),
        ("encoding.store", "command.cli", False),
        ("families.base", "levers.swap", False),
        ("levers.swap", "families", False),
        ("data.dataset", "families.base", False),
        ("levers", "data.part", False),
    ],
)
def test_room_rule(importer: str, imported: str, allowed: bool) -> None:
    assert (broken_rule(f"{PACKAGE}.{importer}", f"{PACKAGE}.{imported}") is None) == allowed


def test_imports_are_found() -> None:
    source = (
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "from . import base\n"
        "from ..records import Batch\n"
        "from qwen_image_finetune import records\n"
        "if TYPE_CHECKING:\n"
        "    import torch\n"
        "def load():\n"
        "    import diffusers.models\n"
    )
    found = {(item.name, item.line, item.runs_at_import) for item in imports_of(source, f"{PACKAGE}.families.new")}
    assert found >= {
        (f"{PACKAGE}.families.base", 3, True),
        (f"{PACKAGE}.records", 4, True),
        (f"{PACKAGE}.records", 5, True),
        ("torch", 7, False),
        ("diffusers.models", 9, False),
    }
    of_folder = [item.name for item in imports_of("from .base import Family", f"{PACKAGE}.families", is_package=True)]
    assert of_folder == [f"{PACKAGE}.families.base"]


def test_nothing_forbidden() -> None:
    broken = [
        f"{where(name, line)}: {reason}"
        for name, path in modules().items()
        for line, reason in forbidden_in(path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "eval(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "hasattr(model, 'config')",
        "try:\n    run()\nexcept Exception:\n    pass",
        "try:\n    run()\nexcept (ValueError, BaseException) as error:\n    print(error)",
        "try:\n    run()\nexcept:\n    pass",
    ],
)
def test_forbidden_is_seen(source: str) -> None:
    assert list(forbidden_in(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "yaml.safe_load(text)",
        "torch.load_state(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "try:\n    run()\nexcept ValueError:\n    pass",
        "try:\n    run()\nexcept BaseException:\n    clean_up()\n    raise",
    ],
)
def test_allowed_is_left_alone(source: str) -> None:
    assert not list(forbidden_in(source))


# What writes to a path, and where the path stands among the arguments; None is what the method is called on.
WRITERS: dict[str, int | None] = {
    "write_text": None, "write_bytes": None, "touch": None, "save_pretrained": 0, "save_config": 0, "save_file": 1,
    "save_torch_state_dict": 1, "copy": 1, "copy2": 1, "copyfile": 1, "copytree": 1, "move": 1, "replace": 1,
    "rename": 1, "symlink": 1, "link": 1, "symlink_to": None, "hardlink_to": None, "savez": 0, "tofile": 0,
}  # fmt: skip
ON_MODULES = {"copy": "shutil", "copy2": "shutil", "copyfile": "shutil", "copytree": "shutil", "move": "shutil",
              "replace": "os", "rename": "os", "symlink": "os", "link": "os"}  # fmt: skip
# `save` of these is another one's: they write through the door themselves.
SAVERS = frozenset({"samples", "trained", "book", "fingerprints"})
DOORS = frozenset({"disk.files", "disk.locks", "disk.runs"})  # what stages, locks, and moves what is whole
APART = frozenset({"studio"})  # stages uploads, jobs and thumbnails in a hidden folder of its own; writes no run


def unstaged_writes(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) for every write that is neither to a name that `staged_file` or `staged_folder` gave nor to memory.

    A function may be handed such a name: a parameter annotated `Staged`, which mypy follows to where it came from.
    """
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node): function for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (target := written_by(node)) is not None:
            function = inside.get(id(node))
            if ast.unparse(target) != "os.devnull" and root_of(target) not in (
                set() if function is None else staged_in(function)
            ):
                yield node.lineno, ast.unparse(node)


def written_by(call: ast.Call) -> ast.expr | None:
    """The path that a call writes to; None where it writes to none."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    words = [*call.args, *(keyword.value for keyword in call.keywords)]
    if name == "open":
        modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        flags = [word for word in words if re.search(r"O_(WRONLY|RDWR|CREAT|APPEND)", ast.unparse(word))]
        if not flags and not any(re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", mode) for mode in modes):
            return None
        return words[0] if owner is None or ast.unparse(owner) in ("os", "io") else owner
    if name == "save" and words and (owner is None or root_of(owner) not in SAVERS):
        return None if owner is None else words[0]  # safetensors' function of that name returns bytes
    if name not in WRITERS or (name in ON_MODULES and ast.unparse(owner or call.func) != ON_MODULES[name]):
        return None
    place = WRITERS[name]
    return owner if place is None else words[place]


def root_of(path: ast.expr) -> str:
    """`folder` of `folder / name` and of `folder.path`."""
    while not isinstance(path, ast.Name):
        inner = next((child for child in ast.iter_child_nodes(path) if isinstance(child, ast.expr)), None)
        if inner is None:
            return ""
        path = inner
    return path.id


def staged_in(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names in a function that may be written to."""
    found = {
        argument.arg
        for argument in ast.walk(function.args)
        if isinstance(argument, ast.arg) and argument.annotation and ast.unparse(argument.annotation) == "Staged"
    }
    for node in ast.walk(function):
        if isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
            if re.match(r"(\w+\.)?staged_(file|folder)\(", ast.unparse(node.context_expr)):
                found.add(node.optional_vars.id)
        elif isinstance(node, ast.Assign) and "io.BytesIO()" in ast.unparse(node.value):
            targets = [each for target in node.targets for each in ast.walk(target)]
            found |= {each.id for each in targets if isinstance(each, ast.Name)}
    return found


def test_every_writer_goes_through_one_door() -> None:
    """A write that is killed, or finds the disk full, leaves what was there: only staged names are written to."""
    broken = [
        f"{where(name, line)}: {what}: write through disk.files"
        for name, path in modules().items()
        if name.removeprefix(f"{PACKAGE}.") not in DOORS
        and not APART & set(name.split("."))
        and name.startswith(PACKAGE)
        for line, what in unstaged_writes(path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("line", "is_seen"),
    [
        ("open(path, 'w')", True),
        ("open(path, mode='ab')", True),
        ("path.open('x')", True),
        ("os.open(path, os.O_WRONLY)", True),
        ("path.write_text(text)", True),
        ("picture.save(path)", True),
        ("picture.save(path, 'PNG')", True),
        ("save_file(tensors, folder / 'a')", True),
        ("pipe.save_pretrained(folder)", True),
        ("shutil.copy(one, other)", True),
        ("os.replace(one, other)", True),
        ("open(path, 'rb')", False),
        ("open(path)", False),
        ("path.open(encoding='utf-8')", False),
        ("text.replace('a', 'w')", False),
        ("save_file(tensors, staged / 'a')", False),
        ("(given / 'a').write_text(text)", False),
        ("picture.save(content, 'PNG')", False),
        ("book.save(state)", False),
        ("memory.copy()", False),
    ],
)
def test_unstaged_writes_are_seen(line: str, is_seen: bool) -> None:
    source = (
        f"def write(path, given: Staged):\n    content, kind = io.BytesIO(), 'PNG'\n"
        f"    with staged_folder(path) as staged:\n        {line}\n"
    )
    assert bool(list(unstaged_writes(source))) == is_seen


def test_light_modules_say_nothing_heavy() -> None:
    """Their own lines, and those of every module of ours that loads with them."""
    waiting = [f"{PACKAGE}.{name}" for name in LIGHT]
    seen, broken = set[str](), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for found in imports(name):
            if found.runs_at_import and found.name.split(".")[0] in HEAVY:
                broken.append(f"{where(name, found.line)}: {found.name} is loaded with one of {LIGHT}")
            if found.runs_at_import and found.name in modules():
                waiting.append(found.name)
    assert not broken, "\n".join(broken)


def test_light_modules_load_nothing_heavy() -> None:
    """The same, seen from a fresh interpreter: also what third parties bring with them."""
    names = ", ".join(f"{PACKAGE}.{name}" for name in LIGHT)
    program = f"import sys, {names}; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def _normalised(requirement: str) -> str:
    """Name of a distribution as packaging compares it, without its extras and version."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def test_every_dependency_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    declared = {_normalised(text) for text in [*project["dependencies"], *extras]}
    distributions = importlib.metadata.packages_distributions()
    undeclared = []
    for name in modules():
        for found in imports(name):
            top = found.name.split(".")[0]
            if top in sys.stdlib_module_names or top in (PACKAGE, "src"):
                continue
            if declared.isdisjoint(_normalised(owner) for owner in distributions.get(top, [top])):
                undeclared.append(f"{where(name, found.line)}: {top} is not in pyproject.toml")
    assert not undeclared, "\n".join(undeclared)


def test_what_tests_leave_lies_in_the_folder_of_their_session(shared_folder: Path) -> None:
    """Launchers of torch leave files in the temporary folder, of this process and of those that it starts."""
    assert {Path(tempfile.gettempdir()), Path(os.environ["TMPDIR"])} == {shared_folder / "temporary"}


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their names alone: two of one name end the whole suite before it begins."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_package_and_project_agree_on_the_version() -> None:
    import qwen_image_finetune

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert qwen_image_finetune.__version__ == project["version"]


def test_lock_names_no_place_of_one_machine() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"[\w.-]+==[\w.+!]+( ; .+)?$", line) for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configuration_loads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, with the checkpoint there that it names: scripts write some of them first."""
    from qwen_image_finetune.config import load_config
    from qwen_image_finetune.families import FAMILIES

    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    checkpoint, trainer = written["model"]["pretrained_model_name_or_path"], written["train"]["trainer"]
    if checkpoint.count("/") > 1:  # a folder; the hub has owner/name
        monkeypatch.chdir(tmp_path)
        Path(checkpoint).mkdir(parents=True)
        index = {"_class_name": FAMILIES[trainer].pipeline}
        Path(checkpoint, "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    assert load_config(path).train.trainer == trainer


@pytest.mark.parametrize(
    "path",
    [ROOT / "accelerate_config.yaml", *sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))],
    ids=lambda path: path.name,
)
def test_launch_configuration_loads(path: Path) -> None:
    """accelerate itself reads it, refuses unknown keys, and leaves the precision to the run's configuration."""
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    assert load_config_from_file(str(path)).num_processes >= 1
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "--module", "src.main"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.mixed_precision == "no"
    assert arguments.use_fsdp == (path.name == "fsdp2.yaml")
    assert not arguments.use_fsdp or int(arguments.fsdp_version) == 2
