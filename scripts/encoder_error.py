"""What model.quantize_text_encoders costs: how far the text embeddings of some pairs are from those in 16 bits.

    python scripts/encoder_error.py CONFIG.yaml --pairs 8
    python scripts/encoder_error.py CONFIG.yaml --tiles     # what model.vae_tiling costs

Of each embedding that the family gives, over its tokens: |8 bits - bf16| / |bf16|. Beside it, with --float32, what bf16
itself is off from float32. Of latents, in float32: |tiles - whole| / |whole|, of the first reference of each pair and
of noise of its size, with tiles of about a third and two thirds of its width that overlap as model.vae_tiling's do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.config import load_config, resolve_family
from qwen_image_finetune.encoding.pairs import open_dataset
from qwen_image_finetune.families import get_family
from qwen_image_finetune.families.base import Family, Reference
from qwen_image_finetune.levers import tiling
from qwen_image_finetune.machine.accelerator import resolve_device


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--pairs", type=int, default=8, help="the first ones of the data set")
    parser.add_argument("--float32", action="store_true", help="also load the encoders in float32")
    parser.add_argument(
        "--tiles", action="store_true", help="latents of pictures in tiles, in place of text embeddings"
    )
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    family = get_family(resolve_family(config, download=True)[0])
    folder, dataset = loading.checkpoint_folder(config, family), open_dataset(config, family)
    homes = {"default": resolve_device(None, "cache.text_encoder_device")}
    examples = [dataset.load(index) for index in range(min(options.pairs, len(dataset)))]
    if options.tiles:
        pipe = loading.load_encoders(family, folder, torch.float32, homes, text=False)
        print(f"{family.name}, {len(examples)} pairs")
        for line in of_tiles(family, pipe, [example.references[0] for example in examples]):
            print(line)
        return 0

    def embedded(dtype: torch.dtype, format: str | None = None) -> list[dict[str, Tensor]]:
        pipe = loading.load_encoders(family, folder, dtype, homes, vae=False, text_format=format, say=print)
        found = []
        for example in examples:
            shown = [Reference(*one) for one in zip(example.references, example.reference_sizes, strict=True)]
            text = family.encode_text(pipe, example.prompt, shown)
            found.append({name: tensor.float().cpu() for name, tensor in text.items()})
        return found

    wide = embedded(torch.bfloat16)
    rows = [(f"{format} against bf16", embedded(torch.bfloat16, format), wide) for format in ("int8", "fp8")]
    if options.float32:
        rows.append(("bf16 against float32", wide, embedded(torch.float32)))
    print(f"{family.name}, {len(examples)} pairs")
    for title, ours, theirs in rows:
        for line in compared(ours, theirs):
            print(f"{title:20}  {line}")
    return 0


def of_tiles(family: Family, pipe: Any, pictures: Sequence[Image.Image]) -> Iterator[str]:
    """A line for pictures and one for noise, with each width of tiles."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, np.asarray(one).shape, dtype=np.uint8)) for one in pictures]
    for thirds in (1, 2):
        for name, shown in (("pictures", pictures), ("noise", noise)):
            errors = []
            for picture in shown:
                tile = max(picture.width * thirds // 3 // 32, 1) * 32  # so that strides are whole latents
                stride = tile * tiling.STRIDE // tiling.TILE
                whole = family.encode_image(pipe, picture)
                with mock.patch.multiple(tiling, TILE=tile, STRIDE=stride), tiling.tiled(pipe.vae, True):
                    errors.append(float((family.encode_image(pipe, picture) - whole).norm() / whole.norm()))
            yield f"tiles of {tile} of {picture.width} pixels, {name}: {statistics.median(errors):.1%} (median)"


def compared(ours: Sequence[dict[str, Tensor]], theirs: Sequence[dict[str, Tensor]]) -> Iterator[str]:
    """A line for each embedding: the relative errors of all its tokens."""
    for name in theirs[0]:
        errors: list[float] = []
        for one, other in zip(ours, theirs, strict=True):
            size = other[name].norm(dim=-1)
            errors += ((one[name] - other[name]).norm(dim=-1) / size)[size > 0].flatten().tolist()
        yield f"{name}: {statistics.median(errors):.1%} of a token's length (median), {max(errors):.1%} at most"


if __name__ == "__main__":
    sys.exit(main())
