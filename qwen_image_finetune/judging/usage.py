"""How what was trained is used elsewhere, as lines of Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def loading_words(settings: Mapping[str, Any], weights: str) -> str:
    """Python that gives a diffusers pipeline `pipe` a LoRA, and those that were under its training.

    Args:
        settings: of the run, by dotted key.
        weights: what `load_lora_weights` takes.
    """
    under = settings.get("model.base_loras") or []
    lines = []
    if file := settings.get("model.transformer_file"):
        lines.append(f"# trained on the transformer in {json.dumps(str(file))}, not on the pipeline's own")
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
