"""Levers transform a transformer from outside and never know its family.

The written order, which `prepare` keeps:

1. frozen weights, quantised while they are loaded
2. adapters, or everything unfrozen; the timestep exact
3. block swap: which weights are on the card
4. attention backend
5. recomputation of activations, inside of what is compiled
6. offload of activations
7. shard
8. gradient release, once there is an optimizer

Each step sees what the ones before it left: adapters must wrap the quantised layers, recomputation and compile must see
the adapters, and sharding comes after them because it replaces the parameters themselves. Pairs that exclude each other
stand in `config.exclusions`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from qwen_image_finetune.config import Config


def prepare(
    transformer: nn.Module,
    config: Config,
    device: torch.device | None = None,
    ranks: Mapping[str, int] | None = None,
) -> nn.Module:
    """Make a freshly loaded transformer ready for training; changes it in place and returns it.

    Args:
        device: where it will run, if it is not there yet; with train.blocks_to_swap, all but those blocks moves there.
        ranks: of modules whose adapter has another rank than model.lora.r.

    A LoRA to start from (model.lora.pretrained_weight) is not read here: `lora_files.load_lora` fills the adapter.

    Raises:
        ConfigError: model.lora does not fit the transformer, or train.attention does not run on this machine.
    """
    from qwen_image_finetune.levers.attention import use_attention
    from qwen_image_finetune.levers.single_steps import PRECISION
    from qwen_image_finetune.levers.timestep import keep_timestep_exact
    from qwen_image_finetune.lora import adapters

    train = config.train
    if config.model.lora is None:
        adapters.make_everything_trainable(transformer, PRECISION[train.weight_precision])
    else:
        adapters.add_adapter(transformer, config.model.lora, config.train.seed, ranks)
    keep_timestep_exact(cast(Any, transformer))
    if isinstance(train.blocks_to_swap, int) and train.blocks_to_swap > 0:
        from qwen_image_finetune.levers.swap import swap_blocks

        swap_blocks(transformer, train.blocks_to_swap, device or next(transformer.parameters()).device)
    use_attention(transformer, train.attention, train.mixed_precision)
    keep = train.recomputation_keeps
    if train.compile:
        from qwen_image_finetune.levers.compile import compile_transformer

        compile_transformer(transformer, keep)
    elif keep is not None:
        from qwen_image_finetune.levers.recompute import recompute

        recompute(transformer, keep)
    if train.offload_activations:
        from qwen_image_finetune.levers.offload import Offload

        Offload(transformer)
    return transformer
