"""What weights take and what a step sends, per process, for one to 64 cards: arithmetic on the real architectures.

    python scripts/parallel_costs.py [--accumulation K]

Counted are weights, gradients and the state of AdamW; activations come on top and are the same in every row. Sent are
bytes per process and optimizer step with ring algorithms: an all-reduce of b bytes sends 2 b (n - 1) / n, an
all-gather or a reduce-scatter b (n - 1) / n. FSDP2 gathers the weights in the forward and again in the backward pass
of every micro-batch; data parallel sends the trained gradients once a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

CARDS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the default of model.lora.target_modules
RANK = 16
FROZEN, TRAINED, GATHERED = 2, 16, 4  # bytes a weight: bfloat16; float32 weight, gradient and two moments; float32


@dataclass(frozen=True)
class Size:
    """Numbers of weights of one family."""

    name: str
    base: int
    adapter: int
    unit: int  # of the largest block


def sizes() -> Iterator[Size]:
    """Of the published models, which are the defaults of diffusers' classes, built without memory."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

    for name, cls, options in (
        ("FLUX.1 Kontext", FluxTransformer2DModel, {"guidance_embeds": True}),
        ("Qwen-Image-Edit", QwenImageTransformer2DModel, {}),
    ):
        with init_empty_weights():
            model: nn.Module = cls(**options)
        linear = [(key, layer) for key, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        adapted = [layer for key, layer in linear if key.endswith(tuple(f".{ending}" for ending in TARGETS))]
        units = [module for module in model.modules() if type(module).__name__ in cls._no_split_modules]
        yield Size(
            name,
            base=count(model),
            adapter=sum(RANK * (layer.in_features + layer.out_features) for layer in adapted),
            unit=max(count(unit) for unit in units),
        )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def rows(size: Size, full: bool, processes: int, accumulation: int) -> Iterator[tuple[str, float, float]]:
    """(way, bytes held, bytes sent per step) of one process."""
    share = (processes - 1) / processes
    trained = size.base if full else size.adapter
    frozen = 0 if full else size.base
    whole = frozen * FROZEN + trained * TRAINED
    yield "data parallel", whole, 2 * share * trained * GATHERED
    if processes > 1:
        width = GATHERED if full else FROZEN
        gathered = frozen * FROZEN + trained * GATHERED
        # Two units are whole at a time: one computes while the next is gathered.
        yield (
            "FSDP2", whole / processes + 2 * size.unit * width,
            accumulation * share * (2 * gathered + trained * GATHERED),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step and process")
    accumulation = parser.parse_args().accumulation
    for size in sizes():
        print(
            f"\n{size.name}: {size.base / 1e9:.2f} billion weights, a LoRA of rank {RANK} has {size.adapter / 1e6:.1f} "
            "million"
        )
        for full in (False, True):
            print(f"  {'full fine-tuning' if full else 'LoRA on a bfloat16 base'}, {accumulation} micro-batches a step")
            print(f"  {'cards':>7} {'way':<14} {'held, GB':>9} {'sent a step, GB':>16}")
            for processes in CARDS:
                for way, held, sent in rows(size, full, processes, accumulation):
                    print(f"  {processes:>7} {way:<14} {held / 1e9:>9.1f} {sent / 1e9:>16.3f}")


if __name__ == "__main__":
    main()
