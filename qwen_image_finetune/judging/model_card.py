"""What a run is on the hub: its weights, a card made from what the run knows, its settings and a few pictures.

The words of the card's head are those of the hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from PIL import Image

from qwen_image_finetune.config.family import REPOSITORY
from qwen_image_finetune.disk.files import Staged, staged_folder
from qwen_image_finetune.disk.reading import read_json
from qwen_image_finetune.disk.versions import LORA_WEIGHTS, step_of
from qwen_image_finetune.drawing.samples import side_by_side
from qwen_image_finetune.families import FAMILIES, get_family
from qwen_image_finetune.judging.evaluate import INPUT, RESULTS, TRUTH
from qwen_image_finetune.judging.pages.reading import Version, changed, flat
from qwen_image_finetune.judging.pages.shapes import Evaluation, mean_words
from qwen_image_finetune.judging.request import BASE, COPY, checkpoints
from qwen_image_finetune.judging.usage import family_of, loading_words, pipeline_words

CARD, SETTINGS, PICTURES = "README.md", "config.yaml", "samples"
MOST_PICTURES, HEIGHT = 6, 512  # pixels
MASKED = "(left out)"


@dataclass(frozen=True)
class Shown:
    """A picture of the card: what is side by side in it, from left to right, and the sentence."""

    file: str
    parts: tuple[str, ...]
    prompt: str


def prepare(run: Path, which: str, folder: Path, repository: str, pictures: bool = True) -> Path:
    """Fill a folder with what `repository` is to hold, in place of what was in it; returns the checkpoint taken.

    Weights are linked where the disk allows it, else copied.

    Args:
        which: "best" (latest where no pairs were held out), "latest" or a step.
        folder: a folder of ours; it appears whole or not at all.
        pictures: whether held-out pairs and what was drawn of them are shown. They are pictures of the data set.

    Raises:
        ReportError, EvaluationError: the folder is no run, or has no such checkpoint.
    """
    version = Version(run)
    (checkpoint,) = checkpoints(run, which)
    with staged_folder(folder, sealed=False) as staged:
        _weights(checkpoint, staged)
        shown = list(_pictures(version, checkpoint, staged)) if pictures else []
        (staged / SETTINGS).write_text(yaml.safe_dump(told(version), sort_keys=False, allow_unicode=True), "utf-8")
        (staged / CARD).write_text(card(version, checkpoint, repository, shown), "utf-8")
    return checkpoint


def card(version: Version, checkpoint: Path, repository: str, shown: list[Shown]) -> str:
    """The text of README.md: a head that the hub reads, then what a person wants to know."""
    is_lora = (checkpoint / LORA_WEIGHTS).is_file()
    title = repository.partition("/")[2]
    prompts = [one.prompt for one in shown] or [row.prompt for row in version.samples]
    parts = [
        f"---\n{yaml.safe_dump(head(version, is_lora, shown, prompts), sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        _about(version, checkpoint, is_lora),
    ]
    if shown:
        parts.append(f"From left to right: {', '.join(shown[0].parts)}. Nobody trained on these pairs.")
        parts += [f"![{_inline(one.prompt)}]({one.file})\n\n{_inline(one.prompt)}" for one in shown]
    if version.evaluation is not None:
        parts += ["## Measured on held-out pairs", _measured(version.evaluation)]
    parts += ["## Use", _use(version, checkpoint, repository, is_lora), "## Trained with", _settings(version)]
    return "\n\n".join(parts) + "\n"


def head(version: Version, is_lora: bool, shown: list[Shown], prompts: list[str]) -> dict[str, Any]:
    """The fields that the hub reads; what is not known is left out."""
    base, family = base_of(version), version.settings.get("train.trainer")
    edits = family not in FAMILIES or get_family(str(family)).max_references > 0
    task = "image-to-image" if edits else "text-to-image"
    found: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    if base is not None:
        found |= {"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"}
        found |= licence(base)
    found["tags"] = [*(["lora"] if is_lora else []), "diffusers", task, "qwen-image-finetune"]
    if prompts:
        found["instance_prompt"] = Counter(prompts).most_common(1)[0][0]
    if shown:
        found["widget"] = [{"text": one.prompt, "output": {"url": one.file}} for one in shown]
    return found


def base_of(version: Version) -> str | None:
    """The hub id of the base; None for a folder of somebody's machine."""
    name = str(version.settings["model.pretrained_model_name_or_path"])
    return name if REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def licence(base: str) -> dict[str, str]:
    """That of the base, which what was trained on it inherits; nothing for a base that is not in our table."""
    for words in (one.licence for name in FAMILIES for one in get_family(name).published if one.name == base):
        if words == "Apache 2.0":
            return {"license": "apache-2.0"}
        plain = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")
        return {"license": "other", "license_name": plain, "license_link": f"https://huggingface.co/{base}"}
    return {}


def _family(version: Version, base: str) -> str | None:
    """Whose transformer was trained, by the settings or by our table."""
    known = (name for name in FAMILIES if any(one.name == base for one in get_family(name).published))
    return version.settings.get("train.trainer") or next(known, None)


def told(version: Version) -> dict[str, Any]:
    """The settings of the run, without secrets and without places on the machine it ran on."""
    written = yaml.safe_load(version.yaml)
    found = _told(written, base_of(version))
    assert isinstance(found, dict)
    return found


def _told(value: Any, base: str | None, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _told(inner, base, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_told(inner, base, key) for inner in value]
    if not isinstance(value, str):
        return value
    if re.search(r"token|secret|password|api_?key|credential", key, flags=re.IGNORECASE):
        return MASKED
    is_place = value.startswith(("/", "~", "./", "../")) or ("/" in value and value != base and Path(value).exists())
    return PurePath(value).name if is_place else value


def _weights(checkpoint: Path, staged: Staged) -> None:
    names = [LORA_WEIGHTS] if (checkpoint / LORA_WEIGHTS).is_file() else ["transformer"]
    for name in names:
        found = checkpoint / name
        for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
            place = file.relative_to(checkpoint)
            if file.is_dir():
                (staged / place).mkdir(parents=True)
                continue
            (staged / place).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.resolve(), staged / place)
            except OSError:  # another disk, or one without links
                shutil.copyfile(file, staged / place)


def _pictures(version: Version, checkpoint: Path, staged: Staged) -> Iterator[Shown]:
    """Of the evaluation, if it measured this checkpoint, else of the samples drawn last."""
    strips = list(_evaluated(version, checkpoint)) or list(_drawn(version, checkpoint))
    for place, (names, pictures, prompt) in enumerate(strips[:MOST_PICTURES]):
        (staged / PICTURES).mkdir(exist_ok=True)
        height = min(pictures[-1].height, HEIGHT)
        side_by_side(list(zip(names, pictures, strict=True)), height)[0].save(staged / PICTURES / f"{place}.png")
        yield Shown(f"{PICTURES}/{place}.png", names, prompt)


Strip = tuple[tuple[str, ...], list[Image.Image], str]


def _evaluated(version: Version, checkpoint: Path) -> Iterator[Strip]:
    folder = version.path / "evaluation"
    if not (folder / RESULTS).is_file():
        return
    by_name = {one["name"]: one["pictures"] for one in read_json(folder / RESULTS)["candidates"]}
    ours = [name for name in by_name if name not in (BASE, COPY) and name.split(" x ")[0] == checkpoint.name]
    for place, about in enumerate(by_name[ours[-1]] if ours else []):
        rows = [
            ("before", folder / INPUT / f"{place}.png"),
            ("the base", folder / by_name[BASE][place]["file"]),
            ("this model", folder / about["file"]),
            ("wanted", folder / TRUTH / f"{place}.png"),
        ]
        there = [(name, file) for name, file in rows if file.is_file()]
        yield tuple(name for name, _ in there), [Image.open(file).convert("RGB") for _, file in there], about["prompt"]


def _drawn(version: Version, checkpoint: Path) -> Iterator[Strip]:
    names = {"base": "the base", "truth": "wanted"}
    for sample in version.samples:
        steps = [step for step in sample.drawn if step <= step_of(checkpoint)]
        if steps:
            parts = {names.get(name, name): image for name, image in sample.pictures.items()}
            wanted = parts.pop("wanted", None)
            parts["this model"] = sample.drawn[max(steps)]
            if wanted is not None:
                parts["wanted"] = wanted
            yield tuple(parts), list(parts.values()), sample.prompt


def _about(version: Version, checkpoint: Path, is_lora: bool) -> str:
    settings, base = version.settings, base_of(version)
    what = "A LoRA" if is_lora else "A fine-tuned transformer"
    of = f" for [{base}](https://huggingface.co/{base})" if base else f" for {_place(settings)}"
    trained = f"{len(version.pairs.trained):,} pairs of pictures" if version.pairs else "pairs of pictures"
    held = f" {len(version.pairs.held_out):,} more were held out." if version.pairs and version.pairs.held_out else ""
    return f"{what}{of}, trained on {trained} in {step_of(checkpoint):,} steps.{held}"


def _place(settings: dict[str, Any]) -> str:
    return f"`{PurePath(str(settings['model.pretrained_model_name_or_path'])).name}`"


def _measured(found: Evaluation) -> str:
    names = [name for name in found.metrics if any(one.means.get(name) for one in found.candidates)]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {one.name} | {' | '.join(mean_words(one.means.get(name)) for name in names)} |" for one in found.candidates
    ]
    meaning = [f"- **{name}**: {found.metrics[name].words}" for name in names]
    about = (
        f"Means over {found.pictures} pairs with 95 % intervals; {found.num_inference_steps} sampler steps, guidance "
        f"{found.guidance_scale:g}, seed {found.seed}."
    )
    return "\n".join([*lines, "", about, "", *meaning])


def _use(version: Version, checkpoint: Path, repository: str, is_lora: bool) -> str:
    base = base_of(version) or "THE_BASE"
    if is_lora:
        file = checkpoint / LORA_WEIGHTS
        load = f"{pipeline_words(family_of(file), base)}\n{loading_words(flat(told(version)), repository, file)}"
        note = "`qif export` writes the same file under the names of ComfyUI or kohya's scripts."
    else:
        load = pipeline_words(_family(version, base), base, repository)
        note = "In place of the base's transformer; everything else is the base's."
    return f"```python\n{load}\n```\n\n{note}"


def _settings(version: Version) -> str:
    own = changed(flat(told(version))).items()
    lines = [f"| `{key}` | `{json.dumps(value, ensure_ascii=False)}` |" for key, value in own]
    made = version.packages.get("qwen-image-finetune")
    by = f"qwen-image-finetune {made}" if made else "qwen-image-finetune"
    return "\n".join([f"{by}; `{SETTINGS}` has all settings.", "", "| setting | value |", "|---|---|", *lines])


def _inline(text: str) -> str:
    """A sentence as text of a card: on one line, and no markup."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|])", r"\\\1", " ".join(text.split()))
