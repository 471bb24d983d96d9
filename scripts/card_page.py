"""The section of docs/performance.md that scripts/card.py writes: what was expected of each row, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_image_finetune.disk.files import write_atomic

if TYPE_CHECKING:
    from card_rows import Row

GIB = 1 << 30
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- written by scripts/card.py, from docs/card.json -->", "<!-- to here -->"
HEAD = (
    "| model | variant | ms expected | found | ratio aimed at | found | peak GiB aimed at | expected | found |",
    "|---|---|---|---|---|---|---|---|---|",
)


def section(written: dict[str, Any], rows: Sequence[Row]) -> str:
    """Markdown of a study's file; what it lacks stays blank.

    Args:
        written: the content of that file.
    """
    known: dict[str, dict[str, Any]] = written["rows"]
    lines = [f"Card: {written['device'] or ''}; torch: {written['torch'] or ''}.", "", *HEAD]
    notes: list[str] = []
    for row in rows:
        if not row.variant:  # the tests
            notes += _of_tests(known.get(row.name, {}).get("found")) + _of_missing(row, known)
            continue
        expected, found = known.get(row.name, {}).get("predicted", {}), known.get(row.name, {}).get("found", {})
        baseline = known.get(row.beside.name, {}).get("found", {})
        words = [row.family, row.name.removeprefix(f"{row.family} "), _milliseconds(expected), _milliseconds(found)]
        words += ["" if row.ratio is None else f"{row.ratio:g}", _ratio(baseline, found)]
        words += ["" if row.peak is None else f"{row.peak:g}", _peak(expected), _peak(found)]
        lines.append(f"| {' | '.join(words)} |".replace("  ", " "))
        notes += [f"- {row.name}: {found[key]}" for key in ("error",) if key in found]
        notes += _of_missing(row, known)
        notes += [f"- {row.name}: {expected[key]}" for key in ("why", "error") if key in expected and key not in found]
    return "\n".join([*lines, "", *dict.fromkeys(notes)]).rstrip() + "\n"


def write(text: str) -> None:
    """Put the section where it belongs."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    write_atomic(PAGE, f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}")


def _of_tests(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    if "error" in found:
        return [f"- `pytest tests/gpu`: {found['error']}"]
    if "not_run" in found:
        return [f"- `pytest tests/gpu`: not run: {found['not_run']}"]
    failed = f" ({', '.join(found['failures'])})" if found["failures"] else ""
    return [
        f"- `pytest tests/gpu`: {found['passed']} passed, {found['failed']} failed{failed}, {found['skipped']} skipped"
    ]


def _of_missing(row: Row, known: dict[str, dict[str, Any]]) -> list[str]:
    """Why a row that was tried has no figure; of those never tried the blank says it."""
    missing = known.get(row.name, {}).get("missing", {"tries": 0})
    return [f"- {row.name}: {missing['why']}"] if missing["tries"] else []


def _milliseconds(each: dict[str, Any]) -> str:
    return f"{'~' * each.get('guess', False)}{each['milliseconds']:.0f}" if "milliseconds" in each else ""


def _peak(each: dict[str, Any]) -> str:
    return f"{each['peak_bytes'] / GIB:.2f}" if each.get("peak_bytes") is not None else ""


def _ratio(baseline: dict[str, Any], found: dict[str, Any]) -> str:
    if "milliseconds" not in baseline or "milliseconds" not in found:
        return ""
    return f"{baseline['milliseconds'] / found['milliseconds']:.2f}"
