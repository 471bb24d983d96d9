"""The noise level in float32 up to the model's own timestep embedding.

diffusers' transformers cast the timestep to the precision of their activations first. In bfloat16 that leaves 128
levels between 0.5 and 1, and the model would be told another level than the noise it sees. Samplers round on purpose:
their timesteps come in that precision and go the way of the pipelines.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor


def keep_timestep_exact(transformer: ModelMixin) -> None:
    """Hand a float32 timestep that `transformer` is called with to its embedding as it is."""
    embedding = transformer.time_text_embed
    unit = 1000 / embedding.time_proj.scale  # what the embedding expects for a noise level of 1
    told: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        told[:] = [kwargs["timestep"] * unit]

    def replace(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if told[0].dtype != torch.float32:
            return None
        timestep, (rounded, *rest) = told[0], args
        if len(rounded) == 2 * len(timestep):  # zero_cond_t: the references are modulated at timestep 0
            timestep = torch.cat([timestep, timestep * 0])
        return (timestep, *rest)

    transformer.register_forward_pre_hook(note, with_kwargs=True)
    embedding.register_forward_pre_hook(replace)
