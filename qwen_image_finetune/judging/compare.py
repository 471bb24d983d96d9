"""`qif compare`: runs side by side, and what was set differently."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.judging.metrics import METRICS
from qwen_image_finetune.judging.pages.curves import Curve, Series, charts, legend
from qwen_image_finetune.judging.pages.html import document, escape, is_page, picture, section, table
from qwen_image_finetune.judging.pages.reading import Version, said
from qwen_image_finetune.judging.pages.shapes import ReportError
from qwen_image_finetune.judging.report import headline
from qwen_image_finetune.judging.request import BASE, COPY

if TYPE_CHECKING:
    from PIL.Image import Image

HEIGHT = 256
CURVES = {  # metric: title, unit
    "loss": ("Training loss", ""),
    "preservation_loss": ("Distance from the base's own answers (loss.preservation)", ""),
    "held_out_loss": ("Held-out loss", ""),
    "held_out_difference": ("Held-out loss minus the base's (below 0 is better)", ""),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm before clipping", ""),
    "step_seconds": ("Time of a step", "s"),
    "memory_gib": ("Peak memory", "GiB"),
}


def compare(paths: Sequence[Path], output: Path, overwrite: bool = False) -> Path:
    """Write the page; returns its file.

    Raises:
        ReportError: a folder is no run, or there is only one.
        OutputError: as for `report`.
    """
    if len(paths) < 2:
        raise ReportError(f"{len(paths)} run to compare: give two or more version folders")
    check_output(output, overwrite, is_page)
    found = [Version(path) for path in paths]
    names = labels(found)
    parts = (
        section("runs", "Runs", summary(found, names)),
        section("difference", "Difference of the settings", difference(found, names)),
        section("curves", "Curves", curves(found, names)),
        section("samples", "Last samples", samples(found, names)),
        section("metrics", "Evaluation", evaluation(found, names)),
    )
    write_atomic(output, document("Runs side by side", ", ".join(names), parts))
    return output


def labels(found: Sequence[Version]) -> list[str]:
    """A name for each run; numbered where two are called alike."""
    names = [version.name for version in found]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def summary(found: Sequence[Version], names: Sequence[str]) -> str:
    """The headlines of the runs, one a column."""
    values = [dict(headline(version)) | held_out(version) for version in found]
    keys = list(dict.fromkeys(key for each in values for key in each))
    return table(["", *names], [[key, *(each.get(key, "-") for each in values)] for key in keys])


def held_out(version: Version) -> dict[str, str]:
    """What the last candidate of its evaluation is worth, measure by measure, and the base in brackets."""
    if version.evaluation is None:
        return {}
    base = {one.name: one for one in version.evaluation.candidates}.get(BASE)
    tuned = [one for one in version.evaluation.candidates if one.name not in (BASE, COPY)]
    if not tuned:
        return {}
    shown = {}
    for metric in METRICS:
        value, before = tuned[-1].means.get(metric), base and base.means.get(metric)
        if value is not None:
            shown[f"held-out {metric}"] = f"{value.mean:.4g}" + (f" (base {before.mean:.4g})" if before else "")
    return shown


def difference(found: Sequence[Version], names: Sequence[str]) -> str:
    """Settings and versions that are not the same in all runs."""
    trees = [{**_pairs(version), **version.settings, **_packages(version)} for version in found]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    rows = [[key, *(said(tree[key]) if key in tree else "-" for tree in trees)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return '<p class="note">None: all were set alike.</p>'
    return table(["setting", *names], rows)


def _packages(version: Version) -> dict[str, str]:
    return {f"version of {name}": said(value) for name, value in version.packages.items()}


def _pairs(version: Version) -> dict[str, str]:
    """How many pairs were trained on and held out, and a sum of their contents: two runs may hold out others."""
    if version.pairs is None:
        return {}
    parts = {"pairs trained on": version.pairs.trained, "pairs held out": version.pairs.held_out}
    return {name: _counted([content for _, content in known]) for name, known in parts.items()}


def _counted(contents: Sequence[str]) -> str:
    total = hashlib.sha256("".join(sorted(contents)).encode()).hexdigest()
    return f"{len(contents)} (content {total[:8]})" if contents else "0"


def curves(found: Sequence[Version], names: Sequence[str]) -> str:
    """The same curve of all runs in one figure."""
    figures = [
        Curve(title, [
            Series(name, version.points(metric), place, smooth=metric in ("loss", "grad_norm", "step_seconds"))
            for place, (version, name) in enumerate(zip(found, names, strict=True))
        ], unit)
        for metric, (title, unit) in CURVES.items()
    ]  # fmt: skip
    return legend(names) + charts(figures)


def samples(found: Sequence[Version], names: Sequence[str]) -> str:
    """The newest sample of every pair in every run, beside its truth."""
    keys = list(dict.fromkeys(sample.key for version in found for sample in version.samples))
    if not keys:
        coming = [
            f"{name}: {version.to_come('samples', version.first_samples)}"
            for version, name in zip(found, names, strict=True)
            if version.first_samples is not None
        ]
        return f'<p class="note">None of the runs has drawn samples. {escape(" ".join(coming))}</p>'
    blocks = []
    for key in keys:
        figures, about = list[str](), ""
        for version, name in zip(found, names, strict=True):
            sample = next((each for each in version.samples if each.key == key), None)
            if sample is None:
                continue
            if not figures:
                about = sample.prompt
                figures += [_figure(sample.pictures[part], part, "") for part in sample.pictures]
            step = max(sample.drawn)
            figures.append(_figure(sample.drawn[step], name, f"step {step}"))
            if step in sample.averaged:
                figures.append(_figure(sample.averaged[step], name, f"step {step}, the average"))
        blocks.append(f'<h3>{escape(key)}: {escape(about)}</h3><div class="grid small">{"".join(figures)}</div>')
    return "".join(blocks)


def _figure(image: Image, name: str, note: str) -> str:
    return (
        f"<figure>{picture(image, name, HEIGHT)}<figcaption><b>{escape(name)}</b> {escape(note)}</figcaption></figure>"
    )


def evaluation(found: Sequence[Version], names: Sequence[str]) -> str:
    """Every candidate of every evaluated run; only those on the same pairs are comparable, so the pairs are named."""
    candidates = [
        (name, version.evaluation, candidate)
        for version, name in zip(found, names, strict=True)
        if version.evaluation is not None
        for candidate in version.evaluation.candidates
    ]
    metrics = [metric for metric in METRICS if any(each.means.get(metric) for _, _, each in candidates)]
    rows = []
    for name, evaluation, candidate in candidates:
        values = [candidate.means.get(metric) for metric in metrics]
        shown = ["-" if value is None else f"{value.mean:.4g}" for value in values]
        rows.append([f"{name}: {candidate.name}", evaluation.dataset, *shown])
    if not rows:
        return '<p class="note">None of the runs is evaluated yet: <code>qif evaluate RUN</code>.</p>'
    return table(["", "pairs", *metrics], rows)
