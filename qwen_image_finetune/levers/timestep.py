"""The noise level in float32 up to the model's own timestep embedding.

diffusers' transformers cast the timestep to the precision of their activations first. In bfloat16 that leaves 128
levels between 0.5 and 1, and the model would be told another level than the noise it sees. Samplers round on purpose:
their timesteps come in that precision and go the way of the pipelines.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21TemporalTimesteps
from torch import Tensor

# diffusers' sinusoids, each with its factor between what it is given and the angles of the slowest wave.
SINUSOIDS = {Timesteps: "scale", QwenImage21TemporalTimesteps: "time_factor"}


def keep_timestep_exact(transformer: ModelMixin) -> None:
    """Hand a float32 timestep that `transformer` is called with to the sinusoids of its embedding as it is.

    What each of diffusers' sinusoids is asked for first is the timestep, a guidance scale comes after it. They compute
    in float32 whatever they are given, so only what goes in is exchanged.

    Raises:
        ValueError: the transformer has no such module.
    """
    sinusoids = [module for module in transformer.modules() if type(module) in SINUSOIDS]
    if not sinusoids:
        raise ValueError(f"{type(transformer).__name__} has no sinusoidal timestep embedding of diffusers")
    scales = [getattr(module, SINUSOIDS[type(module)]) for module in sinusoids]
    told: dict[int, Tensor] = {}  # by the number of the module that has not been asked yet

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        told.clear()
        if kwargs["timestep"].dtype == torch.float32:  # 1000 is what sinusoids of scale 1 expect for a noise level of 1
            told.update((number, kwargs["timestep"] * (1000 / scale)) for number, scale in enumerate(scales))

    def exchange(number: int, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        timestep = told.pop(number, None)
        if timestep is None:
            return None
        rounded, *rest = args
        if rounded.dtype == torch.float32:  # not rounded on the way: a model in float32, or one that leaves it exact
            return None
        # Rows behind those of the batch: the level 0, at which some models modulate references.
        timestep = torch.cat([timestep, timestep.new_zeros(len(rounded) - len(timestep))])
        return (timestep, *rest)

    transformer.register_forward_pre_hook(note, with_kwargs=True)
    for number, module in enumerate(sinusoids):
        module.register_forward_pre_hook(partial(exchange, number))
