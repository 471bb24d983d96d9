"""Which layers of a transformer are quantised, how well that goes, and doing it.

Quantised are the linear layers inside the repeated blocks: nearly all of the weights (over 99 % in FLUX.1 and
Qwen-Image), modulation included. The few outside (embeddings of pixels, text and time, the last norm and projection)
are what every token passes unrepeated, and too small to matter; they keep full precision. So does each layer inside
whose error is above the bound of its format: it does not fit the format, and would harm more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.levers.model_files import model_class, opened, skeleton
from qwen_image_finetune.levers.quantized_linear import QuantizedLinear, quantised
from qwen_image_finetune.levers.single_file import SingleFile

# Largest error with which a layer is still quantised. Gaussian weights come out at 0.026, 0.008, 0.092 and 0.122.
BOUNDS = {"fp8": 0.05, "int8": 0.05, "nf4": 0.15, "fp4": 0.20}
SAMPLED_ROWS = 64  # of each layer, where a folder is looked at without loading it


@dataclass(frozen=True)
class Report:
    """What became of the linear layers of a transformer."""

    format: str
    stored: bool  # they came quantised
    errors: tuple[tuple[str, float], ...]  # of the layers quantised here, worst first
    kept: tuple[tuple[str, float], ...]  # above the bound of the format, left in full precision
    num_quantised: int
    num_linear: int
    merged: tuple[tuple[str, float], ...] = ()  # that came quantised and, changed, were quantised again; worst first

    def words(self, what: str = "frozen base") -> str:
        """One or two lines for the person who started the run."""
        line = f"{what} in {self.format}{' as stored' * self.stored}: "
        line += f"{self.num_quantised} of {self.num_linear} linear layers"
        if self.errors:
            line += f", worst error {self.errors[0][1]:.1%} ({self.errors[0][0]})"
        if self.merged:
            mean = sum(error for _, error in self.merged) / len(self.merged)
            line += (
                f"\nmodel.base_loras cost a second rounding of {len(self.merged)} layers: {mean:.1%} of their weights "
                f"on average, {self.merged[0][1]:.1%} at worst ({self.merged[0][0]})"
            )
        if self.kept:
            listed = ", ".join(f"{name} ({error:.1%})" for name, error in self.kept)
            line += f"\nabove {BOUNDS[self.format]:.0%} and therefore left in full precision: {listed}"
        return line


def quantize(transformer: nn.Module, format: str) -> Report:
    """Replace the layers of a transformer that is already in memory, one after the other, where they are."""
    errors: dict[str, float] = {}
    kept: dict[str, float] = {}
    layers = list(candidates(transformer))
    for name, layer in layers:
        replacement, error = quantised_within_bound(layer.weight, format)
        if replacement is None:
            kept[name] = error
        else:
            errors[name] = error
            replace(transformer, name, replacement)
    return report(transformer, format, errors, kept)


def quantize_text_encoder(encoder: nn.Module, format: str, device: torch.device | str) -> Report:
    """Store the linear layers of an encoder's repeated blocks in 8 bits, one by one on `device`, where they stay.

    Products stay in the precision of what comes in. Layers that came quantised are left as they are, and so are those
    that the encoder's library wants precise: it asks for the dtype of their weight.
    """
    blocks = tuple(f"{name}." for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList))
    precise = set(getattr(encoder, "_keep_in_fp32_modules", None) or ())
    errors: dict[str, float] = {}
    kept: dict[str, float] = {}
    for name, layer in list(encoder.named_modules()):
        if type(layer) is not nn.Linear or not name.startswith(blocks) or not precise.isdisjoint(name.split(".")):
            continue
        new, error = quantised_within_bound(layer.weight.to(device), format)
        (kept if new is None else errors)[name] = error
        if new is not None:
            new.may_compute_in_8_bits = False
            new.will_run_on(new.weight.device)
            replace(encoder, name, new)
    return report(encoder, format, errors, kept)


def quantization_errors(
    source: nn.Module | Path | str, format: str, rows: int | None = None, file: SingleFile | None = None
) -> list[tuple[str, float]]:
    """Relative error of each layer that `format` would be used for, worst first (see `relative_error`).

    Args:
        source: a transformer, or a folder of one in diffusers layout, whose weights are read layer by layer.
        rows: look at this many rows of a layer, evenly spread; None is all of them.
        file: has the weights in place of the folder.

    Raises:
        ConfigError: the folder cannot be read.
    """
    weights = _weights(source) if isinstance(source, nn.Module) else _stored_weights(Path(source), file)
    errors = []
    for name, weight in weights:
        step = 1 if rows is None else max(1, weight.shape[0] // rows)
        sample = weight[::step].contiguous()
        errors.append((name, relative_error(sample, quantised(sample, format))))
    return _worst_first(dict(errors))


@torch.no_grad()
def relative_error(weight: Tensor, layer: QuantizedLinear) -> float:
    """Root mean square over the inputs j of |W_j - W'_j| / |W_j|: columns of a weight (out, in), and as it is stored.

    It is the relative error of the output for inputs that each contribute as much as any other. The plain norm of the
    matrix would be ruled by a few columns of large weights, whose inputs are small in a trained network, and hide that
    all others were rounded to nothing beside them.
    """
    exact = weight.float()
    wrong = (layer.dequantised(torch.float32) - exact).square_().sum(0)
    size = exact.square().sum(0)
    return float(torch.where(size > 0, wrong / size, wrong).mean().sqrt())


def quantised_within_bound(weight: Tensor, format: str) -> tuple[QuantizedLinear | None, float]:
    """The layer and its error; None in place of one whose error is above the bound, or not a number."""
    layer = quantised(weight, format)
    error = relative_error(weight, layer)
    return (layer if error <= BOUNDS[format] else None), error


def candidates(transformer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers inside the blocks that the model's class says it repeats.

    Raises:
        ConfigError: it says nothing about blocks.
    """
    repeated = cast(Any, transformer)._repeated_blocks
    if not repeated:
        raise ConfigError(f"{type(transformer).__name__} does not say which blocks it repeats, so it is not quantised")
    blocks = tuple(f"{name}." for name, module in transformer.named_modules() if type(module).__name__ in repeated)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(blocks) and not isinstance(module, QuantizedLinear):
            yield name, module


def replace(transformer: nn.Module, name: str, layer: QuantizedLinear) -> None:
    """Put `layer` where the linear layer `name` is; the bias that is there moves over."""
    parent, _, child = name.rpartition(".")
    old = transformer.get_submodule(name)
    layer.bias = cast(nn.Linear, old).bias
    layer.train(old.training)
    setattr(transformer.get_submodule(parent), child, layer)


def report(
    transformer: nn.Module,
    format: str,
    errors: dict[str, float],
    kept: dict[str, float],
    stored: bool = False,
    merged: Mapping[str, float] | None = None,
) -> Report:
    """Count what is there."""
    linear = [module for module in transformer.modules() if isinstance(module, nn.Linear)]
    num_quantised = sum(isinstance(module, QuantizedLinear) for module in linear)
    of_merged = tuple(_worst_first(merged or {}))
    worst, wide = tuple(_worst_first(errors)), tuple(_worst_first(kept))
    return Report(format, stored, worst, wide, num_quantised, len(linear), of_merged)


def _worst_first(errors: Mapping[str, float]) -> list[tuple[str, float]]:
    """Sorted by error; what is not a number is the worst."""
    return sorted(errors.items(), key=lambda item: (item[1] == item[1], -item[1]))


def _weights(transformer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, layer in candidates(transformer):
        yield name, layer.weight.detach()


def _stored_weights(folder: Path, file: SingleFile | None) -> Iterator[tuple[str, Tensor]]:
    with opened(file or folder) as checkpoint:
        for name, _ in candidates(skeleton(model_class(folder), folder)):
            yield name, checkpoint.read(f"{name}.weight")
