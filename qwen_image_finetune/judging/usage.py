"""How what was trained is used elsewhere, as lines of Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_image_finetune.config.registry import FAMILIES
from qwen_image_finetune.disk.versions import LORA_WEIGHTS
from qwen_image_finetune.lora.header import read_metadata

BY_PEFT = """\
import json, peft
from safetensors import safe_open

for name, path in {files}:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
        state = {{key.removeprefix("transformer."): file.get_tensor(key) for key in file.keys()}}
    config = peft.LoraConfig(**{{key.removeprefix("transformer."): value for key, value in about.items()}})
    peft.inject_adapter_in_model(config, pipe.transformer, name)
    peft.set_peft_model_state_dict(pipe.transformer, state, name)"""
TOGETHER = """\
for layer in pipe.transformer.modules():  # it was trained on top of the first
    if isinstance(layer, peft.tuners.lora.LoraLayer):
        layer.set_adapter({names})
        for name, strength in zip({names}, {strengths}):
            if name in layer.scaling:
                layer.set_scale(name, strength)"""


def pipeline_words(family: str | None, base: str, transformer: str | None = None) -> str:
    """Python, with its imports, that makes `pipe` of a base, in bfloat16 on a card.

    Args:
        family: a name of FAMILIES; None where it is not known.
        base: folder or hub id.
        transformer: a repository of the hub that has a fine-tuned one; it takes the place of the base's.
    """
    modular = family in FAMILIES and FAMILIES[family].modular
    name, of = "ModularPipeline" if modular else "DiffusionPipeline", json.dumps(base)
    lines = ["import torch", f"from diffusers import {name if transformer is None else f'AutoModel, {name}'}", ""]
    if transformer is not None:
        where = f'{json.dumps(transformer)}, subfolder="transformer", dtype=torch.bfloat16'
        lines.append(f"transformer = AutoModel.from_pretrained({where})")
    if not modular:
        own = "" if transformer is None else "transformer=transformer, "
        lines.append(f'pipe = {name}.from_pretrained({of}, {own}dtype=torch.bfloat16).to("cuda")')
        return "\n".join(lines)
    lines.append(f"pipe = {name}.from_pretrained({of})")
    if transformer is not None:  # before the others: what is there is not loaded
        lines.append("pipe.update_components(transformer=transformer)")
    return "\n".join([*lines, "pipe.load_components(dtype=torch.bfloat16)", 'pipe.to("cuda")'])


def loading_words(settings: Mapping[str, Any], weights: str, file: Path) -> str:
    """Python that gives a diffusers pipeline `pipe` a LoRA, and those that were under its training.

    Args:
        settings: of the run, by dotted key.
        weights: what `load_lora_weights` takes: the file, or a repository of the hub.
        file: the LoRA, on this machine; it says whose it is. Where diffusers has no loader for it, peft loads it.
    """
    under = settings.get("model.base_loras") or []
    lines = []
    if base := settings.get("model.transformer_file"):
        lines.append(f"# trained on the transformer in {json.dumps(str(base))}, not on the pipeline's own")
    entry = FAMILIES.get(family_of(file) or "")
    if entry is not None and not entry.loads_loras:
        return "\n".join([*lines, *_by_peft(under, weights)])
    if not under:
        return "\n".join([*lines, f"pipe.load_lora_weights({json.dumps(weights)})"])
    names = [*(f"under_{place}" for place in range(len(under))), "trained"]
    files = [*(str(one["file"]) for one in under), weights]
    lines += [
        f"pipe.load_lora_weights({json.dumps(file)}, adapter_name={json.dumps(name)})"
        for file, name in zip(files, names, strict=True)
    ]
    strengths = [*(float(one["strength"]) for one in under), 1.0]
    lines.append(
        f"pipe.set_adapters({json.dumps(names)}, {json.dumps(strengths)})  # it was trained on top of the first"
    )
    return "\n".join(lines)


def family_of(file: Path) -> str | None:
    """Whose LoRA a file is, as training wrote it there."""
    return read_metadata(file).get("qif.family")


def _by_peft(under: Sequence[Mapping[str, Any]], weights: str) -> list[str]:
    """Lines for a pipeline without `load_lora_weights`; those under it are files in diffusers' names."""
    names = json.dumps([*(f"under_{place}" for place in range(len(under))), "trained"])
    lines, last = [], json.dumps(weights)
    if not weights.endswith(".safetensors"):
        lines.append("from huggingface_hub import hf_hub_download")
        last = f"hf_hub_download({last}, {json.dumps(LORA_WEIGHTS)})"
    files = f"zip({names}, [{', '.join([*(json.dumps(str(one['file'])) for one in under), last])}])"
    lines.append(BY_PEFT.format(files=files))
    if under:
        strengths = json.dumps([*(float(one["strength"]) for one in under), 1.0])
        lines.append(TOGETHER.format(names=names, strengths=strengths))
    return lines
