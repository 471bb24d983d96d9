"""The autoencoders of the toy bases: one short loop for both architectures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen_vae
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = 48
LATENT_CHANNELS = 16
NOISE = 0.1  # added to the latents, in their standard deviations: the decoder must bear what a sampler leaves over
KL = 1e-5  # keeps the latents near unit variance, no more


Vae = Any  # AutoencoderKL or AutoencoderKLQwenImage, whose types the library does not give


def new_vae(family: str) -> Vae:
    """An untrained autoencoder of `family`, four pixels to a latent cell; always the same one.

    Few and wide layers, every residual branch silent at first: it learns several times as fast as a narrow deep one.
    """
    torch.manual_seed(0)
    if family == "flux_kontext":
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(CHANNELS,) * 3,
            layers_per_block=0,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=1,  # more groups would take the mean colour out of each
            sample_size=64,
            shift_factor=0.0,
            scaling_factor=1.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
    else:
        vae = AutoencoderKLQwenImage(
            base_dim=CHANNELS,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1],
            num_res_blocks=0,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".conv2." in name:
                parameter.zero_()
    return vae.to(memory_format=torch.channels_last) if family == "flux_kontext" else vae


def as_pixels(pictures: Tensor) -> Tensor:
    """(n, H, W, 3) bytes to (n, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


@contextmanager
def one_frame() -> Iterator[None]:
    """Run causal 3-D convolutions over a film of one frame as the 2-D ones they then are; three times as fast.

    The frames before the first are zeros, so only the last slice of a kernel in time counts.
    """
    original = qwen_vae.QwenImageCausalConv3d.forward

    def flat(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        padding = (self._padding[2], self._padding[0])
        out = functional.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding)
        return out.unsqueeze(2)

    qwen_vae.QwenImageCausalConv3d.forward = flat
    try:
        yield
    finally:
        qwen_vae.QwenImageCausalConv3d.forward = original


def encode(vae: Vae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents, each (n, C, h, w)."""
    if isinstance(vae, AutoencoderKLQwenImage):
        # Not `vae.encode`, which keeps a cache of frames that a film of one frame never reads.
        mean, log_variance = vae.quant_conv(vae.encoder(pixels.unsqueeze(2)))[:, :, 0].chunk(2, dim=1)
    else:
        mean, log_variance = vae.encoder(pixels).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: Vae, latents: Tensor) -> Tensor:
    """Pixels (n, 3, H, W), about [-1, 1]."""
    film = isinstance(vae, AutoencoderKLQwenImage)
    decoded = vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)))[:, :, 0] if film else vae.decoder(latents)
    pixels: Tensor = decoded
    return pixels


def vae_loss(vae: Vae, pixels: Tensor, generator: torch.Generator) -> Tensor:
    mean, log_variance = encode(vae, pixels)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    spread = NOISE * mean.detach().std()
    drawn = decode(vae, mean + noise * (torch.exp(0.5 * log_variance) ** 2 + spread**2).sqrt())
    error = drawn - pixels
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + 2 * error.square().mean() + KL * 10 * divergence


def train_vae(
    vae: Vae,
    pictures: NDArray[np.uint8],
    steps: int,
    batch_size: int = 4,
    learning_rate: float = 4e-3,
    seed: int = 0,
    device: str = "cpu",
    seconds: float = math.inf,
    report: Callable[[str], None] = print,
) -> None:
    """Train in place on (n, H, W, 3) pictures, then measure the latents' mean and deviation into the config.

    Args:
        device: where to train; the autoencoder is on the CPU afterwards.
        seconds: the end, if it comes before that of `steps`; the learning rate has fallen by then in either case.
    """
    vae.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    data = torch.from_numpy(pictures).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=1e-3)
    began, step, done = time.monotonic(), 0, 0.0  # done: the share of the training
    running = torch.zeros((), device=device)
    vae.train()
    with one_frame():
        while done < 1:
            rate = min(1.0, (step + 1) / 30) * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)
            optimizer.param_groups[0]["lr"] = learning_rate * rate
            rows = torch.randint(len(data), (batch_size,), generator=generator, device=device)
            loss = vae_loss(vae, as_pixels(data[rows]), generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            running += (loss.detach() - running) * max(0.02, 1 / (step + 1))
            step += 1
            done = max(step / steps, (time.monotonic() - began) / seconds)
            if step % 200 == 0 or done >= 1:
                report(f"step {step} of {steps}, {time.monotonic() - began:.0f} s, loss {running.item():.4f}")
    vae.to("cpu").eval()
    measure_latents(vae, as_pixels(data[:256].cpu()))


@torch.no_grad()
def measure_latents(vae: Vae, pixels: Tensor) -> None:
    """Write into the config what brings latents to zero mean and unit deviation, as each architecture has it."""
    with one_frame():
        latents = encode(vae, pixels)[0]
    if isinstance(vae, AutoencoderKLQwenImage):
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    else:
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vae.register_to_config(shift_factor=shift, scaling_factor=scale)


def psnr(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two byte pictures in dB; 60 where they are (nearly) equal."""
    error = np.square(one.astype(np.float64) - other.astype(np.float64)).mean()
    return min(60.0, float(10 * np.log10(255**2 / max(error, 1e-9))))


@torch.no_grad()
def reconstruction(vae: Vae, pictures: NDArray[np.uint8]) -> float:
    """Mean PSNR in dB of pictures (n, H, W, 3) that went through the autoencoder."""
    with one_frame():
        drawn = decode(vae, encode(vae, as_pixels(torch.from_numpy(pictures)))[0])
    given_back = ((drawn.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    return float(np.mean([psnr(a, b) for a, b in zip(given_back, pictures, strict=True)]))
