"""One model in every process, gradients averaged: torch's DDP, told what it would else find out at every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qwen_image_finetune.config import LoraConfig
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting.footprint import replace_parameters, stand_in, usual_sizes, without_memory
from qwen_image_finetune.lora import adapters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ModelMixin


def wrap(
    accelerator: Accelerator, transformer: ModelMixin, family: Family, lora: LoraConfig | None, blind: bool
) -> nn.Module:
    """The transformer as the loop calls it.

    DDP waits for the gradient of every weight. Weights that never get one must be announced, and DDP then looks for
    them in the graph of every step: that is asked for only where there are any. Gradients are kept in the memory that
    is sent, or each would be there twice. Buffers (scales of a quantised base) are constants and not sent again.

    Not `accelerator.prepare_model`: that changes how the transformer itself is called, and samples would no longer be
    drawn as prediction draws them.

    Args:
        blind: some samples have no references.
    """
    if accelerator.num_processes == 1:
        return cast(nn.Module, transformer)
    wrapped = DistributedDataParallel(
        transformer,
        device_ids=None if accelerator.device.type == "cpu" else [accelerator.device],
        find_unused_parameters=bool(unreached(family, dict(transformer.config), lora, blind)),
        gradient_as_bucket_view=True,
    )
    wrapped.broadcast_buffers = False  # at every step; the argument of the same name warns since torch 2.13
    return wrapped


def unreached(
    family: Family, transformer_config: dict[str, Any], lora: LoraConfig | None, blind: bool = False
) -> list[str]:
    """Names of trained weights that the prediction does not depend on, such as the last block's output for the text.

    Learnt from a run of the whole model on tensors without memory: a few seconds for the largest, on any machine.

    Args:
        blind: some samples have no references: then those count too that are reached by references alone.
    """
    with init_empty_weights():
        model: Any = cast(Any, family.transformer).from_config(transformer_config)
    if lora is None:
        model.requires_grad_(True)
    else:
        adapters.add_adapter(model, lora.model_copy(update={"init_lora_weights": True}), seed=0)
    side = 4 * family.side_multiple
    sizes = usual_sizes(family, (side, side))[: 1 if blind and family.references_apart else None]
    batch = stand_in(family, transformer_config, sizes, rows=1, text_tokens=8)
    guidance = 1.0 if family.distilled_guidance(transformer_config) else None
    with without_memory():
        replace_parameters(model, lambda parameter: torch.bfloat16)
        output = family.velocity(model, batch.target, torch.empty(1), batch, guidance)
        reached = {id(leaf) for leaf in leaves(output)}
    return [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in reached
    ]


def leaves(output: Tensor) -> Iterator[Tensor]:
    """The tensors that gradients of `output` would be accumulated in."""
    found, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            yield cast(Any, node).variable
        waiting += [following for following, _ in node.next_functions]
