"""Samples named by a table: metadata.jsonl or metadata.csv in the folder of the data set."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from qwen_image_finetune.data.listing import Row, RowFault, Tree, caption_fault

if TYPE_CHECKING:
    from qwen_image_finetune.config import Columns

METADATA = ("metadata.jsonl", "metadata.csv")
TARGET = ("image", "file_name", "image_path", "path_target", "output_file_name")
# One path or a list; more are numbered.
REFERENCES = ("edit_image", "control", "control_path", "path_control", "input_file_name")
PROMPT = ("prompt", "caption", "text")
MASK = ("mask", "path_mask")

_NUMBERED = re.compile(r"(?:control_path|path_control|control)_(\d+)")


LONGEST_LINE = 16_000_000  # characters of one line of JSON; captions and paths have a few hundred
_WHOLE = 20  # digits of a whole number that is read as one


class _Fault(ValueError):
    """What is wrong with one line."""


def read_metadata(tree: Tree, name: str, *, masks: bool, columns: Columns | None = None) -> tuple[list[Row], list[str]]:
    """Rows in the order of the table, and what is wrong with it, one line each.

    A row's key is the path of its target; a target named again gets "#2", "#3", ... after it.
    """
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    try:
        for line, fields in _lines(tree, name):
            try:
                if isinstance(fields, _Fault):
                    raise fields
                row = _row(tree, fields if columns is None else _renamed(fields, columns), masks)
            except _Fault as fault:
                problems.append(RowFault(f"{tree.folder / name}, line {line}: {fault}", f"{name}, line {line}"))
                continue
            seen[row.target_name] = times = seen.get(row.target_name, 0) + 1
            key = row.target_name if times == 1 else f"{row.target_name}#{times}"
            rows.append(replace(row, key=key))
    except (UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{tree.folder / name}: cannot be read as a table in UTF-8 ({error})")
    return rows, problems


def with_prompts(tree: Tree, name: str, prompts: Mapping[str, str]) -> str:
    """The text of a table with other prompts for the samples of these keys. Other lines of JSON stay as they are.

    Where a sample has a list of prompts, the lines of the new one are.

    Raises:
        KeyError: the table has no sample of a key.
    """
    with open(tree.folder / name, encoding="utf-8-sig", newline="") as file:
        text = file.read()
    wanted, seen = dict(prompts), dict[str, int]()

    def prompt_of(fields: Mapping[str, Any]) -> str | None:
        target = _row(tree, fields, masks=False).target_name
        seen[target] = times = seen.get(target, 0) + 1
        return wanted.pop(target if times == 1 else f"{target}#{times}", None)

    written = _csv_with(text, prompt_of) if name.endswith(".csv") else _json_with(text, prompt_of)
    if wanted:
        raise KeyError(next(iter(wanted)))
    return written


def _json_with(text: str, prompt_of: Callable[[Mapping[str, Any]], str | None]) -> str:
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)  # not at U+2028 and the like, which may stand in a prompt
    for place, line in enumerate(lines):
        if not line.strip():
            continue
        fields = _parsed(line)
        if (prompt := prompt_of(fields)) is not None:
            column, given = _one(fields, PROMPT)
            fields[column] = prompt.split("\n") if isinstance(given, list) else prompt
            lines[place] = json.dumps(fields, ensure_ascii=False) + line[len(line.rstrip("\r\n")) :]
    return "".join(lines)


def _csv_with(text: str, prompt_of: Callable[[Mapping[str, Any]], str | None]) -> str:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    names, written = list(reader.fieldnames or ()), io.StringIO()
    writer = csv.DictWriter(written, names, lineterminator="\n")
    writer.writeheader()
    for fields in reader:
        cells = _cells(fields)
        assert not isinstance(cells, _Fault)  # a table with faults has no rows to write to
        if (prompt := prompt_of(cells)) is not None:
            fields[_one(cells, PROMPT)[0]] = prompt
        writer.writerow(fields)
    return written.getvalue()


def _lines(tree: Tree, name: str) -> Iterator[tuple[int, Mapping[str, Any] | _Fault]]:
    """(line number, fields or what is wrong) of every line that is not blank."""
    with open(tree.folder / name, encoding="utf-8-sig", newline="") as file:
        if name.endswith(".csv"):
            reader = csv.DictReader(file, strict=True)
            _refuse_other_separators(reader.fieldnames or ())
            for fields in reader:
                yield reader.line_num, _cells(fields)
            return
        line = 0
        while text := file.readline(LONGEST_LINE):
            line += 1
            if len(text) == LONGEST_LINE:
                yield line, _Fault(f"longer than {LONGEST_LINE} characters")
                return
            if text.strip():
                try:
                    fields = _parsed(text)
                except _Fault as fault:
                    yield line, fault
                else:
                    yield line, fields if isinstance(fields, dict) else _Fault("not an object {...}")


def _parsed(text: str) -> Any:
    """JSON, in which numbers of any length are welcome: columns of other tools are not ours to judge."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= _WHOLE else float(digits))
    except json.JSONDecodeError as error:
        raise _Fault(f"not JSON ({error})") from error
    except RecursionError as error:
        raise _Fault("brackets nested too deep to be read") from error


def _refuse_other_separators(header: Sequence[str]) -> None:
    for separator, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        names = [name.strip() for name in header[0].split(separator)] if len(header) == 1 else []
        if any(name in (*TARGET, *PROMPT) for name in names[1:]) or (len(names) > 1 and names[0] in TARGET):
            raise csv.Error(f"its cells are separated by {word}; save it with commas between them")


def _cells(fields: Mapping[str | None, Any]) -> Mapping[str, Any] | _Fault:
    """Cells of a CSV line, empty paths as None. A cell that begins with "[" is a JSON list of paths."""
    if None in fields or None in fields.values():
        return _Fault("not as many cells as the first line has")
    cells: dict[str, Any] = {}
    for column, cell in fields.items():
        assert column is not None
        cells[column] = cell if column in PROMPT else cell.strip() or None
        if column in REFERENCES and cell.strip().startswith("["):
            try:
                cells[column] = _parsed(cell)
            except _Fault as fault:
                return _Fault(f"{column} begins like a list but is not one: {fault}")
    return cells


def _row(tree: Tree, fields: Mapping[str, Any], masks: bool) -> Row:
    _refuse_typos(fields)
    target = _path(tree, *_one(fields, TARGET))
    numbered = sorted((int(match[1]), column) for column in fields if (match := _NUMBERED.fullmatch(column)))
    references = [_path(tree, column, fields[column]) for _, column in numbered if fields[column] is not None]
    if any(fields.get(column) is not None for column in REFERENCES):
        column, given = _one(fields, REFERENCES)
        if references and (isinstance(given, list) or numbered[0][0] == 0):
            raise _Fault(f"both {column} and {numbered[0][1]} name references")
        first = [_path(tree, column, each) for each in (given if isinstance(given, list) else [given])]
        references = first + references
    column, given = _one(fields, PROMPT)
    prompts = given if isinstance(given, list) and given else [given]  # several: one is drawn a visit
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise _Fault(f'{column} is {prompt!r}, not a text; the empty prompt is written ""')
        if fault := caption_fault(prompt):
            raise _Fault(f"{column} {fault}")
    mask = next((fields[column] for column in MASK if fields.get(column) is not None), None) if masks else None
    return Row(
        key=target,
        folder=tree.folder,
        target_name=target,
        reference_names=tuple(references),
        caption_name=None,
        prompt=prompts[0],
        more_prompts=tuple(prompts[1:]),
        mask_name=None if mask is None else _path(tree, "mask", mask),
    )


def _renamed(fields: Mapping[str, Any], columns: Columns) -> Mapping[str, Any]:
    """A line under our names, where the configuration says what its columns are."""
    given = [columns.references] if isinstance(columns.references, str) else columns.references
    wanted = [columns.target, columns.prompt, *given, *([columns.mask] if columns.mask else [])]
    if lacking := [name for name in wanted if name not in fields]:
        raise _Fault(f"no column {', '.join(lacking)}; it has {', '.join(fields)}")
    several = [fields[name] for name in given if fields[name] is not None]
    references = several[0] if len(several) == 1 and isinstance(several[0], list) else several
    renamed = {"image": fields[columns.target], "prompt": fields[columns.prompt], "edit_image": references}
    return renamed | ({"mask": fields[columns.mask]} if columns.mask else {})


def _one(fields: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, Any]:
    """The one of `columns` that the line fills, and its value."""
    given = [column for column in columns if fields.get(column) is not None]
    if len(given) != 1:
        raise _Fault(f"{'several' if given else 'none'} of {', '.join(columns)} given; one is needed")
    return given[0], fields[given[0]]


def _path(tree: Tree, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Fault(f"{column} is {value!r}, not the path of a file")
    fault = tree.file_fault(value)
    if fault is None:
        return str(PurePosixPath(value))
    if ".." in PurePosixPath(value).parts or tree.file_fault(spelt := tree.named(value)) is not None:
        raise _Fault(f"{column} {value!r}: {fault}")
    return spelt


def _refuse_typos(fields: Mapping[str, Any]) -> None:
    """Columns of other tools (width, height, ...) are welcome; one that nearly has a name of ours is not."""
    known = (*TARGET, *REFERENCES, *PROMPT, *MASK)
    for column in fields:
        if column in known or _NUMBERED.fullmatch(column):
            continue
        close = difflib.get_close_matches(column, known, n=1, cutoff=0.85)
        if close:
            raise _Fault(f"unknown column {column!r}; did you mean {close[0]!r}?")
