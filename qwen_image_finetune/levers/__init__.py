"""Levers transform a transformer from outside and never know its family.

The written order, which `prepare` keeps:

1. frozen weights, quantised while they are loaded
2. adapters, or everything unfrozen; the timestep exact
3. attention backend
4. recomputation of activations, and offload
5. compile
6. shard

Each step sees what the ones before it left: adapters must wrap the quantised layers, recomputation and compile must see
the adapters, and sharding comes last because it replaces the parameters themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

    from qwen_image_finetune.config import Config


def prepare(transformer: nn.Module, config: Config) -> nn.Module:
    """Make a freshly loaded transformer ready for training; changes it in place and returns it.

    A LoRA to start from (model.lora.pretrained_weight) is not read here: `lora_files.load_lora` fills the adapter.

    Raises:
        ConfigError: model.lora does not fit the transformer, or train.attention does not run on this machine.
    """
    from qwen_image_finetune.levers import adapters
    from qwen_image_finetune.levers.attention import use_attention
    from qwen_image_finetune.levers.timestep import keep_timestep_exact

    if config.model.lora is None:
        adapters.make_everything_trainable(transformer)
    else:
        adapters.add_adapter(transformer, config.model.lora, config.train.seed)
    keep_timestep_exact(cast(Any, transformer))
    use_attention(transformer, config.train.attention, config.train.mixed_precision)
    if config.train.gradient_checkpointing:
        from qwen_image_finetune.levers.recompute import recompute

        keep = config.train.keep_activations
        recompute(transformer, 0.0 if keep == "auto" else keep)
    return transformer
