"""Tiny transformers of both families, without a pipeline around them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel, QwenImageEditPipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

HEAD = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 24}
PIPELINES: dict[str, type[Any]] = {"flux": FluxKontextPipeline, "qwen": QwenImageEditPipeline}


def tiny_transformer(family: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """The same random weights at every call, with so many blocks of each kind; the global random state is not moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if family == "flux":
            model: Any = FluxTransformer2DModel(
                in_channels=8, num_layers=layers, num_single_layers=layers, pooled_projection_dim=12,
                guidance_embeds=True, **HEAD,
            )  # fmt: skip
        else:
            model = QwenImageTransformer2DModel(in_channels=8, out_channels=2, num_layers=layers, **HEAD)
        return model.eval() if dtype == torch.float32 else model.eval().to(dtype)


def run(model: Any) -> Tensor:
    """Its output for fixed inputs, (1, 6, 8), without a graph."""
    with torch.no_grad():
        return forward(model)


def forward(model: Any, text_tokens: int = 5) -> Tensor:
    """Its output for fixed inputs, (1, 6, 8)."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    arguments: dict[str, Any] = {
        "hidden_states": normal(1, 6, 8),
        "encoder_hidden_states": normal(1, text_tokens, 24),
        "timestep": torch.tensor([0.4]),
    }
    if isinstance(model, FluxTransformer2DModel):
        arguments |= {"pooled_projections": normal(1, 12), "guidance": torch.tensor([2.5])}
        arguments |= {"img_ids": torch.arange(18.0).view(6, 3), "txt_ids": torch.zeros(text_tokens, 3)}
    else:
        arguments |= {"encoder_hidden_states_mask": torch.ones(1, text_tokens), "img_shapes": [[(1, 2, 3)]]}
    return model(**arguments, return_dict=False)[0]


def disturb(model: nn.Module, seed: int = 5) -> None:
    """Move the trainable weights as training would: both factors, every element."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
