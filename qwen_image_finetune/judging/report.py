"""`qif report`: one page about a run, in one file that opens anywhere."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from qwen_image_finetune.data.captions import prompts_of
from qwen_image_finetune.data.images import DataError, open_upright
from qwen_image_finetune.data.listing import Row
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.disk.outputs import check_output
from qwen_image_finetune.disk.versions import LORA_WEIGHTS
from qwen_image_finetune.encoding.remembered import content_of
from qwen_image_finetune.judging.pages.curves import Curve, Series, charts
from qwen_image_finetune.judging.pages.html import cards, details, document, escape, is_page, picture, section, table
from qwen_image_finetune.judging.pages.reading import Sample, Version, changed, defaults, flat, said
from qwen_image_finetune.judging.pages.shapes import Evaluation, mean_words
from qwen_image_finetune.judging.usage import family_of, loading_words, pipeline_words

THUMBNAILS, THUMBNAIL_HEIGHT, SAMPLE_HEIGHT = 12, 128, 768
REQUIRED = "model.pretrained_model_name_or_path"  # has no default
AVERAGED = "averaged"
MOST_STEPS = 24  # of the samples; spread over the run where there are more


def report(path: Path, output: Path | None = None, overwrite: bool = False) -> Path:
    """Write the page; returns its file, by default report.html in the run.

    Raises:
        ReportError: the folder is no run.
        OutputError: the file is there already, and no page of ours, without `overwrite`; or belongs to a run.
    """
    version = Version(path)
    file = output or path / "report.html"
    check_output(file, overwrite, is_page)
    settings, steps = version.settings, version.steps
    subtitle = f"{settings['model.pretrained_model_name_or_path']}, {version.state} at step {steps:,}"
    parts = (
        cards(headline(version)),
        section("samples", "Samples", samples(version)),
        section("curves", "Curves", curves(version)),
        section("metrics", "Evaluation", evaluation(version.evaluation)),
        section("data", "Data", data(version)),
        section("files", "Files to take away", files(version)),
        section("settings", "Settings", resolved(version)),
        section("versions", "Versions", versions(version)),
    )
    write_atomic(file, document(f"Run {version.name}", subtitle, parts))
    return file


def headline(version: Version) -> list[tuple[str, str]]:
    """The numbers that matter most."""
    found = [("state", version.state), ("steps", f"{version.steps:,}")]
    if version.pairs is not None:
        found.append(("pairs trained on", f"{len(version.pairs.trained):,}"))
        found.append(("pairs held out", f"{len(version.pairs.held_out):,}"))
    elif version.rows:
        found.append(("pairs", f"{len(version.rows):,}"))
    losses = [value for _, value in version.points("loss")]
    if losses:
        tail = losses[-max(len(losses) // 10, 1) :]
        found.append(("loss, last tenth", f"{sum(tail) / len(tail):.4f}"))
    if held_out := version.points("held_out_difference"):
        found.append(("held-out loss against the base", f"{held_out[-1][1]:+.4f}"))
    if version.best is not None:
        found.append(("best checkpoint", str(version.best["checkpoint"])))
    seconds = sorted(value for _, value in version.points("step_seconds"))
    if seconds:
        found.append(("median step", f"{seconds[len(seconds) // 2]:.2f} s"))
    return found


def data(version: Version) -> str:
    """A few pairs, references left of their target."""
    rows = version.rows
    if not rows:
        where = said(version.settings["data.init_args.dataset_path"])
        return f'<p class="note">The pairs in {escape(where)} are not on this machine.</p>'
    number = min(THUMBNAILS, len(rows))
    figures = []
    for place in range(number):
        row = rows[place * len(rows) // number]
        try:
            pictures = [open_upright(path) for path in (*row.references, row.target)]
            caption = " / ".join(prompts_of(row))
        except DataError as error:
            figures.append(f"<figure><figcaption>{escape(str(error))}</figcaption></figure>")
            continue
        names = [f"reference of {row.key}"] * len(row.reference_names) + [f"target of {row.key}"]
        images = "".join(picture(*each, THUMBNAIL_HEIGHT) for each in zip(pictures, names, strict=True))
        figures.append(
            f'<figure><div class="row">{images}</div><figcaption><b>{escape(row.key)}</b> {_use(version, row)}'
            f"{escape(caption)}"
            "</figcaption></figure>"
        )
    shown = f"{number} of {len(rows):,} pairs, reference left, target right." if number < len(rows) else ""
    return f'<p class="note">{shown}</p><div class="grid">{"".join(figures)}</div>'


def _use(version: Version, row: Row) -> str:
    """Says of a pair that it was held out; all others are trained on."""
    known = version.pairs
    return "(held out) " if known and known.held_out and known.was_held_out(content_of(row)) else ""


def curves(version: Version) -> str:
    """Loss, held-out loss, learning rate, gradient norm, memory and step time, as far as they were recorded."""
    if not version.metrics:
        return '<p class="note">No step was recorded.</p>'
    band = [
        (line["step"], line["held_out_low"], line["held_out_high"])
        for line in version.metrics
        if "held_out_low" in line
    ]
    difference = Series("difference", version.points("held_out_difference"), band=band)
    figures = [
        Curve("Training loss", [Series("loss", version.points("loss"), smooth=True)]),
        Curve("Distance from the base's own answers (loss.preservation)",
              [Series("squared distance", version.points("preservation_loss"), 2, smooth=True)]),
        Curve("Held-out loss", [Series("of the weights", version.points("held_out_loss")),
                                Series("of their average", version.points("held_out_loss_average"), 2)]),
        Curve("Held-out loss minus the base's, with 95 % interval (below 0 is better)", [difference], zero=True),
        Curve("Samples: colour drift where nothing was to change",
              [Series("colour drift", version.points("sample_colour_drift"), 2)], "Delta E", zero=True),
        Curve("Samples: displacement", [Series("displacement", version.points("sample_displacement"), 3)], "pixels",
              zero=True),
        Curve("Learning rate", [Series("learning rate", version.points("learning_rate"), 2)]),
        Curve("Gradient norm before clipping", [Series("gradient norm", version.points("grad_norm"), 3, smooth=True)]),
        Curve("Time of a step, and of waiting for its samples",
              [Series("step", version.points("step_seconds"), 4, smooth=True),
               Series("waiting", version.points("data_seconds"), 5, smooth=True)], "s", zero=True),
        Curve("Peak memory", [Series("memory", version.points("memory_gib"), 5)], "GiB", zero=True),
    ]  # fmt: skip
    return charts(figures) + ("" if band else _unmeasured(version))


def _unmeasured(version: Version) -> str:
    """Why there is no held-out loss, and when there will be."""
    if version.first_measure is not None:
        words = version.to_come("losses of held-out pairs", version.first_measure)
    else:
        words = (
            "No held-out loss: validation.enabled=true with validation.share or validation.dataset_path measures it."
        )
    return f'<p class="note">{escape(words)}</p>'


def samples(version: Version) -> str:
    """Every drawn pair with a slider between what it is compared with and what was drawn, and one for the step."""
    drawn = version.samples
    if not drawn:
        words = "No samples were drawn: validation.enabled=true draws them."
        if version.first_samples is not None:
            words = version.to_come("samples", version.first_samples)
        return f'<p class="note">{escape(words)}</p>'
    every = sorted({step for sample in drawn for step in sample.drawn})
    steps = [every[round(place * (len(every) - 1) / max(min(MOST_STEPS, len(every)) - 1, 1))]
             for place in range(min(MOST_STEPS, len(every)))]  # fmt: skip
    names = list(dict.fromkeys(name for sample in drawn for name in sample.pictures))
    averaged = any(step in sample.averaged for sample in drawn for step in steps)
    names += [AVERAGED] if averaged else []
    keys = "B, T, R and A are base, truth, reference and the average" if averaged else (
        "B, T and R are base, truth and reference")  # fmt: skip
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    controls = (
        f'<div class="controls"><label>step <input type="range" data-control="step" min="0" max="{len(steps) - 1}" '
        f'value="{len(steps) - 1}" data-steps="{",".join(map(str, steps))}"> <output>{steps[-1]}</output></label>'
        f'<label>left side <select data-control="left">{options}</select></label>'
        f'<span class="note">A click shows a picture large; then {keys}.</span></div>'
    )
    figures = "".join(_sides(sample, steps, names[0], averaged) for sample in drawn)
    return f'<div class="viewer">{controls}<div class="grid">{figures}</div></div>'


def _sides(sample: Sample, steps: Sequence[int], left: str, averaged: bool) -> str:
    """The pictures of a pair: what it is compared with, of which the average's differs from step to step, and drawn."""
    size = next(iter(sample.drawn.values())).size
    before = "".join(
        picture(image.resize(size), f"{name} of {sample.key}", SAMPLE_HEIGHT,
                f'data-name="{escape(name)}"{" hidden" * (name != left)}')
        for name, image in sample.pictures.items()
    ) + "".join(_average(sample, step, size) for step in steps if averaged and step in sample.drawn)  # fmt: skip
    after = "".join(
        picture(sample.drawn[step], f"{sample.key} drawn at step {step}", SAMPLE_HEIGHT,
                f'data-step="{step}"{" hidden" * (step != steps[-1])}')
        for step in steps if step in sample.drawn
    )  # fmt: skip
    return (
        f'<figure><div class="sides" tabindex="0" role="button" aria-label="large: {escape(sample.key)}">'
        f'<div class="before">{before}</div><div class="after">{after}</div></div>'
        f'<input class="wipe" type="range" min="0" max="100" value="50" aria-label="where the pictures of '
        f'{escape(sample.key)} meet">'
        f"<figcaption><b>{escape(sample.key)}</b> {escape(sample.prompt)}</figcaption></figure>"
    )


def _average(sample: Sample, step: int, size: tuple[int, int]) -> str:
    """What the average drew at a step; where there was none yet, a grey picture that says so."""
    words = f"{sample.key} drawn by the average at step {step}"
    image = sample.averaged.get(step)
    if image is None:
        image, words = Image.new("RGB", size, "grey"), f"{sample.key}: no average yet at step {step}"
    return picture(image, words, SAMPLE_HEIGHT, f'data-name="{AVERAGED}" data-step="{step}" hidden')


def evaluation(found: Evaluation | None) -> str:
    """Means with their intervals; what each measure means is said below."""
    if found is None:
        return '<p class="note">Not evaluated yet: <code>qif evaluate RUN</code> adds this part.</p>'
    names = [name for name in found.metrics if any(one.means.get(name) for one in found.candidates)]
    heads = [f"{name}, {found.metrics[name].unit}" if found.metrics[name].unit else name for name in names]
    rows = [[one.name, *(mean_words(one.means.get(name)) for name in names)] for one in found.candidates]
    meaning = "".join(
        f"<li><b>{escape(name)}</b>: {escape(about.words)}{escape(_better(about.better))}</li>"
        for name, about in found.metrics.items()
        if name in names
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)
    about = (
        f"{found.pictures} pairs, {found.dataset}; {found.num_inference_steps} sampler steps, guidance "
        f"{found.guidance_scale:g}, seed {found.seed}; means with 95 % bootstrap intervals"
    )
    return f"<p>{escape(about)}</p>{table(['', *heads], rows)}{notes}<ul>{meaning}</ul>"


def _better(direction: str) -> str:
    return f" ({direction} is better)" if direction else ""


def files(version: Version) -> str:
    """Weights with their sizes, and how they are used."""
    rows: list[list[str]] = []
    marked, best = [], None if version.best is None else version.best["checkpoint"]
    for folder in version.checkpoints:
        for name in (LORA_WEIGHTS, "transformer"):
            path = folder / name
            if path.exists():
                if folder.name == best:
                    marked.append(len(rows))
                held = path.rglob("*") if path.is_dir() else [path]
                size = sum(file.stat().st_size for file in held if file.is_file())
                kind = "LoRA" if name == LORA_WEIGHTS else "whole transformer"
                note = "best on held-out pairs" if folder.name == best else ""
                rows.append([str(path.relative_to(version.path)), kind, f"{size / 2**20:.1f} MiB", note])
    if not rows:
        return '<p class="note">No checkpoint was saved.</p>'
    chosen = version.path / rows[marked[0] if marked else -1][0]
    return table(["file", "what", "size", ""], rows, marked) + "".join(usage(version, chosen))


def usage(version: Version, chosen: Path) -> list[str]:
    """The commands that draw with the weights."""
    if chosen.name != LORA_WEIGHTS:
        text = f"transformer = TheModel.from_pretrained({str(chosen)!r})  # in place of the base's, in diffusers"
        return [f"<h3>In diffusers</h3><pre>{escape(text)}</pre>"]
    prompt = version.samples[0].prompt if version.samples else "what to do"
    command = shlex.join([
        "qif", "predict", str(version.path / "config.yaml"), "--image", "picture.png", "--prompt", prompt,
        "--lora", str(chosen),
    ])  # fmt: skip
    base = str(version.settings["model.pretrained_model_name_or_path"])
    python = f"{pipeline_words(family_of(chosen), base)}\n{loading_words(version.settings, str(chosen), chosen)}"
    return [
        f"<h3>On the command line</h3><pre>{escape(command)}</pre>",
        f"<h3>In diffusers</h3><pre>{escape(python)}</pre>",
    ]


def resolved(version: Version) -> str:
    """The settings away from their defaults, and all of them."""
    usual = defaults()
    rows = [
        [key, said(value), said(usual[key]) if key in usual and key != REQUIRED else ""]
        for key, value in changed(version.settings).items()
    ]
    return table(["setting away from its default", "value", "default"], rows) + details("All settings", version.yaml)


def versions(version: Version) -> str:
    """What the run was made with."""
    if not version.environment:
        return '<p class="note">This run did not record them.</p>'
    return table(["", ""], [[name, said(value)] for name, value in flat(version.environment).items()])
