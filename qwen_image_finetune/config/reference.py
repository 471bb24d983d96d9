"""The reference of the configuration in Markdown, from the declarations themselves."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qwen_image_finetune.config.root import Config
from qwen_image_finetune.config.spellings import SPELLINGS
from qwen_image_finetune.config.tree import shown
from qwen_image_finetune.config.values import Section
from qwen_image_finetune.config.words import ELSEWHERE, allowed, section_of

INTRODUCTION = """# Configuration

<!-- Written by `python -m qwen_image_finetune.config`: change the declarations there, not this file. -->

A run is described by one YAML file. Only `model.pretrained_model_name_or_path` has to be there; every other key has a
default.

```yaml
model:
  pretrained_model_name_or_path: Qwen/Qwen-Image-Edit
data:
  init_args:
    dataset_path: data/face_seg
    cache_dir: ${cache.cache_dir} # the value of another key, written or by default
optimizer:
  init_args:
    lr: 1e-4 # a number
```

- Any key can be replaced on the command line, after the file: `train.num_epochs=3`, `model.lora.r=32`,
  `'data.init_args.image_size=[832, 576]'`, `model.lora=null`. The value is YAML and takes the place of what was there;
  a section given this way replaces the whole section.
- Everything wrong is said at once, before anything is loaded: unknown keys with the nearest known one, values with what
  is allowed, keys that contradict each other. A key away from its default that has no effect in this run is named once.
- A file is data: YAML tags and `${oc.env:...}` are refused, and so is a key given twice. Secrets belong in the
  environment of the program that reads them (`HF_TOKEN`, `WANDB_API_KEY`), never in a configuration, because it is
  written beside the results.
- A section with nothing under it means its defaults. One is different: `lora:` with nothing, or `lora: null`, asks for
  full fine-tuning. Without any `lora` key a LoRA with the defaults is trained.
- Older spellings are still read. Where both are given, the key of this page wins, and a note says so if they disagree.
"""


def reference() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        assert section is not None, name
        lines += _section(section, name)
    lines += _elsewhere()
    return "\n".join(lines).rstrip() + "\n"


def _section(section: type[Section], prefix: str) -> Iterator[str]:
    yield f"## {prefix}\n"
    yield f"{(section.__doc__ or '').strip()}\n"
    yield "| key | allowed | default | meaning |"
    yield "|---|---|---|---|"
    inner = []
    for name, field in section.model_fields.items():
        key = f"{prefix}.{name}"
        if (below := section_of(field.annotation)) is not None:
            inner.append((below, key))
            yield _row(
                f"[{key}](#{key.replace('.', '').replace(' ', '-')})",
                "section, or null" if _nullable(field) else "section",
                "",
                field,
            )
        else:
            yield _row(f"`{key}`", allowed(field.annotation, field.metadata), _default(field), field)
    yield ""
    older = [f"`{older}` for `{today}`" for older, today in SPELLINGS if today.rpartition(".")[0] == prefix]
    if older:
        yield f"Older spellings: {', '.join(older)}.\n"
    for below, key in inner:
        yield from _section(below, key)


def _elsewhere() -> Iterator[str]:
    yield "## Names in other trainers\n"
    yield "What ai-toolkit and musubi-tuner call some of these keys; the error about such a name gives ours.\n"
    yield "| there | here |"
    yield "|---|---|"
    for ours in dict.fromkeys(ELSEWHERE.values()):
        yield f"| {', '.join(f'`{theirs}`' for theirs, key in ELSEWHERE.items() if key == ours)} | `{ours}` |"


def _row(key: str, values: str, default: str, field: FieldInfo) -> str:
    cells = (key, values, default, field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _nullable(field: FieldInfo) -> bool:
    return section_of(field.annotation) is not field.annotation


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True, validated_data={"class_path": "torch.optim.AdamW"})
    return "" if default is PydanticUndefined else f"`{shown(default)}`"
