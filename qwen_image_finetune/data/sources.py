"""A folder of pictures to rows: control_images/ beside training_images/, or a table that names the files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image_finetune.config import areas, no_folder
from qwen_image_finetune.data.hub import hub_shards, of_split
from qwen_image_finetune.data.images import DataError
from qwen_image_finetune.data.listing import PICTURES, Row, RowFault, Shared, Tree, same
from qwen_image_finetune.data.metadata import METADATA, read_metadata
from qwen_image_finetune.data.shard_index import Shard, local_shard, place_of, read_shard
from qwen_image_finetune.data.shards import ENDINGS, TABLES
from qwen_image_finetune.machine import console

if TYPE_CHECKING:
    from qwen_image_finetune.config import Columns, DataEntry, DatasetArguments

TARGETS, REFERENCES = "training_images", "control_images"
_OTHER_PICTURES = (".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jfif")
_NUMBERED_FOLDER = re.compile(rf"{REFERENCES}_([1-9]\d*)")
_NUMBERED_STEM = re.compile(r"(.+)_control_0*([1-9]\d*)", re.DOTALL)

Rows = tuple[list[Row], list[str]]
Names = dict[str, str]  # stem -> name of the file, relative to the data set's folder


def read_sets(arguments: DatasetArguments, *, masks: bool) -> Rows:
    """The rows of all data sets, with keys that no two of them share, and every problem, one line each."""
    entries, home = arguments.entries, Path(arguments.shards_dir).expanduser()
    rows: list[Row] = []
    problems: list[str] = []
    for number, (entry, prefix) in enumerate(zip(entries, prefixes(entries), strict=True)):
        listed, found = _read(entry, home, masks, arguments.streaming)
        listed, more = of_set(listed, shared_of(arguments, number))
        problems += [RowFault(line, prefix + line.row) if isinstance(line, RowFault) else line
                     for line in [*found, *more]]  # fmt: skip
        rows += [replace(row, key=prefix + row.key) for row in listed] if prefix else listed
    return rows, problems


def shared_of(arguments: DatasetArguments, number: int) -> Shared:
    """What the rows of a data set have in common: settings of its own, or those of all sets."""
    entry = arguments.entries[number]
    sized = arguments.sized_by(entry)
    dropouts = [
        getattr(arguments if getattr(entry, name) is None else entry, name)
        for name in ("caption_dropout_rate", "prompt_image_dropout_rate")
    ]
    return Shared(
        number=number,
        name=prefixes(arguments.entries)[number].rstrip("/") or _name(entry),
        weight=entry.weight,
        repeats=entry.repeats,
        prefix=entry.prefix or "",
        per_line=entry.prompt_per_line,
        identity=(entry.identity,) if isinstance(entry.identity, str) else tuple(entry.identity or ()),
        image_size=None if sized.image_size is None else (sized.image_size[0], sized.image_size[1]),
        areas=areas(sized.resolution),
        caption_dropout=dropouts[0],
        reference_dropout=dropouts[1],
    )


def of_set(rows: list[Row], shared: Shared) -> Rows:
    """Rows with what all of their set have in common, and what is wrong with those that cannot have it."""
    if not shared.identity:
        return [replace(row, shared=shared) for row in rows], []
    problems: list[str] = [
        RowFault(f"{row.target}: no reference, which a pair of an identity set is made of", row.key)
        for row in rows
        if not row.reference_names
    ]
    first, *more = shared.identity
    return [
        replace(
            row, shared=shared, target_name=row.reference_names[0], caption_name=None, prompt=first,
            more_prompts=tuple(more), mask_name=None,
        )
        for row in rows
        if row.reference_names
    ], problems  # fmt: skip


def prefixes(entries: Sequence[DataEntry]) -> list[str]:
    """What the keys of each data set's rows begin with; nothing where there is one."""
    names = [_name(entry) for entry in entries]
    if len(names) == 1:
        return [""]
    if len(set(names)) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names, start=1)]
    return [f"{name}/" for name in names]


def _name(entry: DataEntry) -> str:
    if entry.on_hub:
        return entry.path.removeprefix("hf://").partition("@")[0].strip("/").replace("/", "--")
    return Path(entry.path).expanduser().resolve().name


def _read(entry: DataEntry, home: Path, masks: bool, streaming: bool) -> Rows:
    """Rows of a data set, wherever it is, and every problem with it, one line each. Opens no picture of a folder.

    Args:
        home: `data.init_args.shards_dir`.
        streaming: shards of the hub that are looked into for the first time do not stay on the disk.
    """
    if entry.on_hub:
        try:
            return _read_shards(hub_shards(entry, home), entry, home, masks, keep=not streaming)
        except DataError as error:
            return [], list(error.problems)
    folder = Path(entry.path).expanduser()
    if folder.is_file() and folder.suffix in (".csv", ".jsonl"):
        return _sorted(read_metadata(Tree(folder.parent), folder.name, masks=masks, columns=entry.columns))
    inside = [] if is_folder_of_pairs(folder) or not folder.is_dir() else _shards_in(folder)
    if not inside:
        return read_folder(_of_split(folder, entry.split), masks=masks, columns=entry.columns)
    try:
        names = of_split(inside, entry.split, entry.path)
    except DataError as error:
        return [], list(error.problems)
    root = folder.resolve()
    outside = [folder / name for name in names if not (folder / name).resolve().is_relative_to(root)]
    if outside:
        return [], [f"{path}: a link that leaves the data set's folder; copy the file there" for path in outside]
    return _read_shards([local_shard(folder, name) for name in names], entry, home, masks, keep=True)


def _of_split(folder: Path, split: str) -> Path:
    """The folder of a split that has a table of its own, as an imagefolder may have them; or the folder itself."""
    own = folder / split
    inside = not is_folder_of_pairs(folder) and own.resolve().is_relative_to(folder.resolve())
    return own if inside and any((own / name).is_file() for name in METADATA) else folder


def needs_tables(entry: DataEntry) -> bool:
    """Whether a data set has, or on the hub will most likely have, parquet or arrow files."""
    folder = Path(entry.path).expanduser()
    if entry.on_hub:
        return True
    return folder.is_dir() and not is_folder_of_pairs(folder) and any(
        name.endswith(TABLES) for name in _shards_in(folder)
    )  # fmt: skip


def is_folder_of_pairs(folder: Path) -> bool:
    """Whether a folder has the layout of pairs, or a table, whatever else lies in it."""
    return any((folder / name).exists() for name in (TARGETS, *METADATA))


def _shards_in(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for ending in ENDINGS
        for path in folder.rglob(f"*{ending}")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read_shards(shards: Sequence[Shard], entry: DataEntry, home: Path, masks: bool, keep: bool) -> Rows:
    rows: list[Row] = []
    problems: list[str] = []
    new = [shard for shard in shards if not place_of(shard, entry.columns, home).is_file()]
    with console.progress("reading shards", len(new), shown=bool(new)) as update:
        for number, shard in enumerate(shards):
            try:
                found, wrong = read_shard(shard, entry.columns, home, masks=masks, keep=keep)
            except OSError as error:
                wrong = [f"{shard.path}: {error}"]
                found = []
            rows, problems = rows + found, problems + wrong
            update(sum(each in new for each in shards[: number + 1]))
    if not rows and not problems:
        problems = [f"{entry.path}: its shards have no rows"]
    return rows, problems


def read_folder(folder: Path, *, masks: bool, columns: Columns | None = None) -> Rows:
    """Rows sorted by key, and every problem with the files' names, one line each. Opens no picture.

    A row that lacks a file is left out of the rows and stands among the problems.

    Args:
        masks: look for edit masks; without, they are told from targets all the same, but not used.
        columns: of its table.
    """
    if not folder.is_dir():
        return [], [f"{folder}: not a folder; name the folder it lies in" if folder.exists() else no_folder(folder)]
    tree = Tree(folder)
    tables = [name for name in METADATA if name in tree.list()]
    if len(tables) > 1:
        return [], [f"{folder}: has {' and '.join(tables)}; keep one"]
    if tables and (fault := tree.file_fault(tables[0])) is not None:
        return [], [f"{folder / tables[0]}: {fault}; the samples would be read from it"]
    found = read_metadata(tree, tables[0], masks=masks, columns=columns) if tables else _read_pairs(tree, masks)
    rows, problems = _sorted(found)
    if not rows and not problems:
        problems = [f"{folder}: no samples in {tables[0] if tables else TARGETS}"]
    return rows, problems


def _sorted(found: Rows) -> Rows:
    return sorted(found[0], key=lambda row: row.key), found[1]


def _read_pairs(tree: Tree, masks: bool) -> tuple[list[Row], list[str]]:
    """Pairs with exactly equal stems."""
    fault = tree.folder_fault(TARGETS)
    if fault is not None:
        return [], [
            f"{tree.folder / TARGETS}: {fault}; it holds the targets, unless {' or '.join(METADATA)} names them"
        ]
    problems: list[str] = []
    targets, captions = _pictures(tree, TARGETS, problems)
    mask_names = _take_masks(targets)
    references, has_references = _references(tree, targets, problems)

    rows = []
    for stem, target in targets.items():
        own = references.get(stem, {})
        missing = []
        if stem not in captions:
            missing.append(f"no caption; {stem}.txt is missing beside it (it may be empty){_near(tree, target)}")
        if has_references and 0 not in own:
            missing.append(f"no reference; {REFERENCES} has no picture {stem}")
        elif sorted(own) != list(range(len(own))):
            missing.append(f"references are numbered {sorted(own)[1:]}; count 1, 2, ... without gaps")
        problems += [RowFault(f"{tree.folder / target}: {line}", stem) for line in missing]
        if not missing:
            ordered = tuple(own[number] for number in sorted(own))
            mask = mask_names.get(stem) if masks else None
            rows.append(Row(stem, tree.folder, target, ordered, captions[stem], None, mask))
    problems += [
        RowFault(f"{tree.folder / caption}: a caption without a picture of that name", stem)
        for stem, caption in captions.items()
        if stem not in targets
    ]
    return rows, problems


def _near(tree: Tree, target: str) -> str:
    """A file beside a target that may be its caption, under another ending."""
    directory, _, name = target.rpartition("/")
    stem = name.rpartition(".")[0]
    others = [
        other for other in sorted(tree.list(directory)) if other != name and other.rpartition(".")[0] in (stem, name)
    ]
    found = [other for other in others if Path(other).suffix.lower() not in (*PICTURES, *_OTHER_PICTURES)]
    return f"; there is {found[0]}: rename it if it is the caption" if found else ""


def _pictures(
    tree: Tree, directory: str, problems: list[str], row_of: Callable[[str], str] = str
) -> tuple[Names, Names]:
    """Pictures and text files directly in `directory`, sorted by name.

    Args:
        row_of: the key of the row that a stem belongs to.
    """
    pictures: Names = {}
    texts: Names = {}
    names = tree.list(directory)
    for name in sorted(names):
        path, kind = f"{directory}/{name}", names[name]
        stem, dot, ending = same(name).rpartition(".")
        ending = (dot + ending).lower()
        if kind != "file":
            words = f"a folder; only what lies directly in {directory} is read" if kind == "folder" else kind
            problems.append(f"{tree.folder / path}: {words}")
        elif ending in PICTURES or ending == ".txt":
            group = texts if ending == ".txt" else pictures
            if stem in group:
                words = f"{group[stem]} has the same stem{_spelt(group[stem], path)}; keep one"
                problems.append(RowFault(f"{tree.folder / path}: {words}", row_of(stem)))
            else:
                group[stem] = path
        elif ending in _OTHER_PICTURES:
            words = f"{ending} is not read; save it as {', '.join(PICTURES)}"
            problems.append(RowFault(f"{tree.folder / path}: {words}", row_of(stem)))
    return pictures, texts


def _spelt(one: str, other: str) -> str:
    """Why two names that look equal are not."""
    stems = [Path(name).name.rpartition(".")[0] for name in (one, other)]
    return "" if stems[0] == stems[1] else " (accents composed in another way)"


def _take_masks(targets: Names) -> Names:
    """Move STEM_mask out of `targets` wherever there is a target STEM; stem -> name of its mask."""
    masks: Names = {}
    for stem in sorted(targets):  # a stem comes before the names that begin with it
        base = stem.removesuffix("_mask")
        if base != stem and base in targets:
            masks[base] = targets.pop(stem)
    return masks


def _references(tree: Tree, targets: Names, problems: list[str]) -> tuple[dict[str, dict[int, str]], bool]:
    """stem -> number -> name of a reference (the first has number 0), and whether there is a folder of them."""
    folders: dict[int, str] = {}
    for name in sorted(tree.list()):
        if name == REFERENCES:
            folders[0] = name
        elif match := _NUMBERED_FOLDER.fullmatch(name):
            folders[int(match[1])] = name
        elif name.startswith(REFERENCES):
            problems.append(f"{tree.folder / name}: not read; references lie in {REFERENCES}, {REFERENCES}_1, ...")
    if not folders:
        problems += _unread_folders(tree)
    elif 0 not in folders:
        problems.append(
            f"{tree.folder}: {folders[min(folders)]} without {REFERENCES}, which holds the first references"
        )

    def place_of(stem: str, number: int) -> tuple[str, int]:
        match = _NUMBERED_STEM.fullmatch(stem) if number == 0 and stem not in targets else None
        return (match[1], int(match[2])) if match else (stem, number)

    def row_of(number: int, stem: str) -> str:
        return place_of(stem, number)[0]

    found: dict[str, dict[int, str]] = {}
    for number, directory in folders.items():
        fault = tree.folder_fault(directory)
        if fault is not None:
            problems.append(f"{tree.folder / directory}: {fault}")
            continue
        pictures, _ = _pictures(tree, directory, problems, partial(row_of, number))
        for stem, name in pictures.items():
            base, place = place_of(stem, number)
            if base not in targets:
                problems.append(RowFault(f"{tree.folder / name}: {TARGETS} has no picture {base}", base))
            elif place in found.setdefault(base, {}):
                words = f"{found[base][place]} is the same reference of {base}; keep one"
                problems.append(RowFault(f"{tree.folder / name}: {words}", base))
            else:
                found[base][place] = name
    return found, bool(folders)


def _unread_folders(tree: Tree) -> list[str]:
    """References under another name would quietly turn editing into training on captions alone."""
    names = [name for name, kind in tree.list().items() if kind != "file" and name != TARGETS]
    close = difflib.get_close_matches(REFERENCES, names, n=1, cutoff=0.75)
    if close:
        return [f"{tree.folder / close[0]}: did you mean {REFERENCES}?"]
    return [
        f"{tree.folder / name}: its pictures are not read; rename it to {REFERENCES} if they are the references, or "
        "move it away to train on captions alone"
        for name in sorted(names)
        if tree.folder_fault(name) is None and any(Path(file).suffix.lower() in PICTURES for file in tree.list(name))
    ]
