"""Which trained weights the prediction does not depend on, against real backward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwen_image_finetune import loading
from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.families import get_family
from qwen_image_finetune.fitting.footprint import stand_in
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora.names import USUAL_TARGETS
from qwen_image_finetune.training.data_parallel import unreached
from tests.kin import UNLIKE

TARGETS: dict[str, Any] = {
    "usual": list(USUAL_TARGETS),
    "text of every block": ["to_add_out", "add_k_proj"],
    "text of the last block": (
        r".*(to_q|img_attn_qkv|blocks\.LAST\.(attn\.to_add_out|txt_mlp\.net\.2|ff_context\.net\.2))"
    ),
    "timestep": r"(time_text_embed|norm_out|condition_embedder\.time_embedder)\..*linear(_[12])?",
    "everything": None,
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", UNLIKE)
def test_equals_backward_passes(name: str, kind: str, tiny_checkpoints: dict[str, Path]) -> None:
    """With no, one and more references, and adapters whose second factor is not zero, so that gradients are not."""
    family = get_family(name)
    model: Any = loading.load_transformer(family, tiny_checkpoints[name], torch.float32)
    if kind == "text of every block" and not any("add_k_proj" in key for key in model.state_dict()):
        pytest.skip("text has no layers of its own")
    targets, last = TARGETS[kind], str(model.config.num_layers - 1)
    of_its_own = kind == "usual" and not any(key.endswith("to_q.weight") for key in model.state_dict())
    if of_its_own:
        targets = list(family.adapter_targets)
    if isinstance(targets, str):
        targets = targets.replace("LAST", last)
    lora = None if targets is None else LoraConfig(r=2, target_modules=targets)
    if lora is None:
        model.requires_grad_(True)
    else:
        adapters.add_adapter(model, lora, seed=0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    expected = unreached(family, dict(model.config), lora, blind=family.references_apart)
    guidance = 1.0 if family.distilled_guidance(model.config) else None
    for num_references in range(min(family.max_references, 2) + 1):
        batch = stand_in(family, dict(model.config), [(64, 64)] * (1 + num_references), 1, 8).to("cpu", torch.float32)
        model.zero_grad()
        family.velocity(model, torch.randn_like(batch.target), torch.tensor([0.5]), batch, guidance).sum().backward()
        without = [key for key, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        if num_references and family.references_apart:  # the pair that reaches the least counts
            assert set(without) <= set(expected), num_references
        else:
            assert without == expected, num_references
    if of_its_own:
        return
    if kind in ("usual", "timestep"):
        assert expected == [] or family.references_apart
    elif any(key.startswith(f"transformer_blocks.{last}.attn.add_k_proj") for key in model.state_dict()) and (
        "num_single_layers" not in model.config
    ):  # text has a stream of its own up to the last block
        assert expected
