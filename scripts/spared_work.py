"""What a step could be spared, counted without a card: by shapes, and by what the compiler plans.

    python scripts/spared_work.py rows      # rows of the last block that the loss never sees
    python scripts/spared_work.py joined    # narrow products that are joined in what is compiled (levers/joined.py)

Both are of 1024x1024 target and reference, batch 1, r = 16, attention kept; times are by the H100's rates
(fitting/speed.py) and 3 TB/s. `joined` compiles one block of each kind at an eighth of its width, its tokens and the
rank: every tensor as long as the tokens, and every weight, then has 1/64 of its bytes, and so have all together. The
compiler plans its kernels and none is made; what is printed are bytes that they read and write, in full size. The base
is in bf16; what is spared is the adapter's, and the same beside any other base.
"""

from __future__ import annotations

import argparse
import sys
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._inductor.graph import GraphLowering

from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.fitting import speed
from qwen_image_finetune.fitting.bench import Options, Variant, config_of, random_transformer
from qwen_image_finetune.fitting.estimate import transformer_config
from qwen_image_finetune.fitting.footprint import footprint, places, stand_in, usual_sizes
from qwen_image_finetune.levers import compile as compiling
from qwen_image_finetune.levers.attention import use_attention
from qwen_image_finetune.levers.recompute import recompute
from qwen_image_finetune.lora import adapters

FAMILIES = ("FluxKontext", "QwenImageEdit", "Flux2Klein")
SIZES = ((1024, 1024), (1024, 1024))  # target and reference
PICTURE = 4096  # tokens of either
RANK, PART = 16, 8
SMALL = ((512, 256), (512, 256))  # PICTURE / PART tokens
BANDWIDTH = 3e12  # bytes a second
TERA = 1e12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "joined"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    count = rows if options.what == "rows" else joined
    for name in options.families:
        for line in count(get_family(name)):
            print(line, flush=True)
    return 0


def rows(family: Family) -> Iterator[str]:
    """Operations of the last block for tokens of text and reference; of these only keys and values are wanted."""
    about = transformer_config(family, None)
    with torch.device("meta"):
        model: Any = family.transformer.from_config(about)
    [*_, block] = places(model)
    text, width = family.text_tokens(SIZES[1:]), about["num_attention_heads"] * about["attention_head_dim"]
    apart = any("add_q" in name for name, _ in block.named_modules())  # text has weights of its own
    products = 0
    for name, layer in block.named_modules():
        keeps = any(part in name for part in ("to_k", "to_v", "add_k", "add_v", "norm", "mod"))  # the last: of one row
        if not isinstance(layer, nn.Linear) or (keeps and "to_qkv" not in name):
            continue
        outputs = layer.out_features - 2 * width * ("to_qkv" in name)
        of_text = any(part in name for part in ("add", "txt", "context"))
        unseen = PICTURE + text if not apart else text if of_text else PICTURE
        products += 2 * unseen * layer.in_features * outputs
    attention = 4 * (PICTURE + text) * (2 * PICTURE + text) * width
    rates = _h100().attained
    assert rates is not None
    forward, backward = rates.attention["flash4"]
    for format, rate in ((None, rates.products), ("fp8", rates.fp8_products)):
        # Products: forward, once more recomputed, and for the gradient of the input. Backward, attention has 2.5 times.
        spared = (3 * products / rate + attention / forward + 2.5 * attention / backward) / TERA
        whole = _step(family, format)
        yield (
            f"{family.name:13} {format or 'bf16':4}  {PICTURE + text} of {2 * PICTURE + text} rows; a pass has "
            f"{products / TERA:.2f} TFLOP of products, {attention / TERA:.2f} of attention; spared: "
            f"{spared * 1e3:.1f} of {whole * 1e3:.0f} ms ({spared / whole:.2%})"
        )


def joined(family: Family) -> Iterator[str]:
    """Bytes and kernels of a block of each kind, forward and backward, before and after; and of all blocks."""
    about = transformer_config(family, None)
    with torch.device("meta"):
        counts = Counter(places(family.transformer.from_config(about)).values())
    before, after = (_planned(family, about, joins) for joins in (False, True))
    spared = 0
    for (place, count), one, other in zip(counts.items(), before, after, strict=True):
        spared += count * (one[0] - other[0])
        yield (
            f"{family.name:13} {count} {place}: {one[0] / 1e9:.2f} GB in {one[1]} kernels each, joined "
            f"{other[0] / 1e9:.2f} GB in {other[1]}"
        )
    took = spared / BANDWIDTH
    shares = (f"{took / (whole := _step(family, format)):.2%} of {whole * 1e3:.0f} ms in {format or 'bf16'}"
              for format in (None, "fp8"))  # fmt: skip
    yield f"{family.name:13} spared: {spared / 1e9:.1f} GB, {took * 1e3:.1f} ms, {', '.join(shares)}"


def _planned(family: Family, about: dict[str, Any], joins: bool) -> list[tuple[int, int]]:
    """(bytes, kernels) of a block of each kind, both passes."""
    torch._dynamo.reset()
    small = {**about, "num_attention_heads": about["num_attention_heads"] // PART}
    small |= {key: 1 for key in ("num_layers", "num_single_layers") if about.get(key)}
    model = random_transformer(family, small, torch.device("cpu"), torch.bfloat16)
    lora = config_of(Options(family.name), Variant()).model.lora
    assert lora is not None
    adapters.add_adapter(model.train(), lora.model_copy(update={"r": RANK // PART}), seed=0)
    use_attention(model, "auto", "bf16")
    batch = stand_in(family, small, SMALL, 1, -(-family.text_tokens(SIZES[1:]) // PART))
    plans: list[tuple[int, int]] = []

    def plan(graph: GraphLowering) -> Any:
        """In place of making kernels: run the graph as it is."""
        graph._update_scheduler()
        plans.append((graph.count_bytes()[0] * PART**2, len(graph.scheduler.nodes)))
        return types.SimpleNamespace(call=lambda inputs: list(graph.module(*inputs)), __file__="", key="")

    options = compiling.OPTIONS if joins else {}
    with (
        mock.patch.object(GraphLowering, "compile_to_module", plan),
        mock.patch.object(compiling, "OPTIONS", options),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch.autocast("cpu", torch.bfloat16),
    ):
        recompute(model, 0.0, compiling.Compilation().wrap)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "embedder" in name)  # so every block's input has one
        guidance = 1.0 if family.distilled_guidance(model.config) else None
        answer = family.velocity(model, batch.target, torch.full((1,), 0.5), batch, guidance)
        answer.float().square().mean().backward()
    kinds = len(plans) // 2
    return [tuple(map(sum, zip(plans[kind], plans[-1 - kind], strict=True))) for kind in range(kinds)]  # type: ignore[misc]


def _step(family: Family, format: str | None) -> float:
    """Seconds of a compiled step, by the planner."""
    about = transformer_config(family, None)
    batch = stand_in(family, about, usual_sizes(family, SIZES[0]), 1, family.text_tokens(SIZES[1:]))
    found = footprint(family, about, batch, config_of(Options(family.name), Variant()).model.lora)
    return speed.supposed(found, speed.Step(0.0, True, format, "flash4"), _h100())


def _h100() -> speed.Card:
    card = speed.card_called("H100")
    assert card is not None
    return card


if __name__ == "__main__":
    sys.exit(main())
