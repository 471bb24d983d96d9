"""Pictures above two megapixels through a VAE in tiles: model.vae_tiling.

By diffusers' own tiling: overlapping tiles are encoded one by one, and blended linearly where they overlap. What the
VAE normalises or attends over is then the tile, no longer the picture; so latents differ a little everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import AutoencoderKL, AutoencoderKLFlux2

ABOVE = 2 * 1024**2  # pixels; smaller pictures are encoded whole
TILE, STRIDE = 1024, 768  # pixels of a side, and from one tile to the next


def tiles(size: tuple[int, int]) -> bool:
    """Whether a picture of (width, height) is encoded in tiles, where that is asked for."""
    return size[0] * size[1] > ABOVE


@contextmanager
def tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Within it the VAE encodes in tiles, if that is wanted."""
    if not wanted:
        yield
        return
    if not isinstance(vae, AutoencoderKL | AutoencoderKLFlux2):  # one of films
        vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_overlap_factor = TILE, 1 - STRIDE / TILE
        vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    try:
        yield
    finally:
        vae.disable_tiling()
