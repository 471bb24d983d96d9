"""Pictures above two megapixels through a VAE in tiles: model.vae_tiling.

By diffusers' own tiling: overlapping tiles are encoded one by one, and blended linearly where they overlap. What the
VAE normalises or attends over is then the tile, no longer the picture; so latents differ a little everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen_image_finetune.config import ConfigError

ABOVE = 2 * 1024**2  # pixels; smaller pictures are encoded whole
TILE, STRIDE = 1024, 768  # pixels of a side, and from one tile to the next


def tiles(size: tuple[int, int]) -> bool:
    """Whether a picture of (width, height) is encoded in tiles, where that is asked for."""
    return size[0] * size[1] > ABOVE


def check(vae: Any) -> None:
    """Raises ConfigError where the class of a VAE cannot tile."""
    if not hasattr(vae, "enable_tiling"):
        raise ConfigError(f"model.vae_tiling=true: {type(vae).__name__} of diffusers has no tiling; set it to false")


@contextmanager
def tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Within it the VAE encodes in tiles, if that is wanted.

    Raises:
        ConfigError: see `check`.
    """
    if not wanted:
        yield
        return
    check(vae)
    if hasattr(vae, "tile_sample_stride_height"):  # one of films
        vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_overlap_factor = TILE, 1 - STRIDE / TILE
        vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    try:
        yield
    finally:
        vae.disable_tiling()
