"""How much memory a run takes, from shapes alone.

What is counted: weights where they lie, the adapter or the masters with gradients and optimizer state, what blocks keep
for the backward pass, the block that is at work, and the encoders while they encode. Compared with measured runs in
docs/performance.md.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qwen_image_finetune.config import Config, DatasetArguments
from qwen_image_finetune.families import with_targets
from qwen_image_finetune.families.base import Family, Published
from qwen_image_finetune.fitting.footprint import Footprint, footprint, stand_in, usual_sizes
from qwen_image_finetune.levers import tiling
from qwen_image_finetune.levers.single_steps import PRECISION
from qwen_image_finetune.levers.stored_precision import base_precision, file_format, header
from qwen_image_finetune.levers.swap import AHEAD
from qwen_image_finetune.loading import encoder_dtype, transformer_file, weight_dtype
from qwen_image_finetune.lora.names import numbered

GIB = 2**30
Size = tuple[int, int]

# Bytes of one weight inside the blocks, scales included (one float32 a row of 3072; blocks of 64, scales in 8 bits).
BYTES = {"fp8": 1.0013, "int8": 1.0013, "nf4": 0.516, "fp4": 0.516}
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # of what can be quantised
# Weights of a text encoder's blocks; T5's "wo" stays as it is.
IN_BLOCKS = re.compile(r"\b(layers|layer|blocks|block)\.\d+\.(?!.*\bwo\.).*\bweight$")
# Bytes of optimizer state for each trained weight; what is not listed is taken for Adam's two float32.
STATE = {"SGD": 0, "Adafactor": 0, "Adam8bit": 2, "AdamW8bit": 2, "PagedAdam8bit": 2, "PagedAdamW8bit": 2,
         "Lion8bit": 1, "PagedLion8bit": 1, "Lion": 4, "CAME": 4, "Muon": 4, "AdEMAMix": 12, "AdEMAMix8bit": 3,
         "PagedAdEMAMix8bit": 3, "Prodigy": 16}  # fmt: skip
ADAM = 8
# What a block needs beside what it keeps, in inputs of the block: gradients on their way, temporary results. Ten is
# what eager runs of both architectures at full size left over (docs/performance.md).
AT_WORK = 10
# Outside of what torch allocates: the driver's context, libraries, the fragments between tensors.
OUTSIDE = GIB
# Of the host, of each process: libraries, the driver, what is read ahead.
PROGRAM = 4 * GIB

AVERAGE = "average of what is trained"
VAE_PARAMETERS = 0.13e9  # of one that is not on this machine: those of Qwen-Image's and Wan's

ENCODER_PARTS = ("text_encoder", "text_encoder_2", "vae_encoder")

# By all that decides one. A full-size model takes seconds, and a plan asks for several runs of the same one.
_footprints: dict[tuple[Any, ...], Footprint] = {}


@dataclass(frozen=True)
class Estimate:
    """Peak bytes, by what they are for."""

    device: dict[str, int]
    host: dict[str, int]
    host_before: dict[str, int]  # on the host before training, one after the other
    encoding: int  # on the device while the data set is encoded, if that happens there
    operations: int  # floating-point operations of one forward and backward pass, with those of loss.preservation

    @property
    def peak(self) -> int:
        """Largest number of bytes that torch allocates on the device while training."""
        return sum(self.device.values())

    @property
    def host_parts(self) -> dict[str, int]:
        """What the host holds at the moment when it holds most."""
        staying = {name: size for name, size in self.host.items() if name in ("the program", "encoders")}
        moments = [self.host, *({**staying, name: size} for name, size in self.host_before.items())]
        return max(moments, key=lambda parts: sum(parts.values()))

    def fits(self, card: int) -> bool:
        """Whether a card of so many bytes has room for it, and for what lies outside of torch's allocator."""
        return max(self.peak, self.encoding) + OUTSIDE <= card


class Estimator:
    """Estimates for one model, one geometry and any settings."""

    def __init__(
        self,
        family: Family,
        config: Config,
        folder: Path | None,
        sizes: Sequence[Size] | None = None,
        references: int | None = None,
    ) -> None:
        """
        Args:
            folder: of the checkpoint; None where it is not on this machine: the published model is taken for it.
            sizes: (width, height) of target and references; without them the size that is set, of the run's pairs and
                of those of loss.preservation.
            references: of each pair, where sizes are those that are set; default: one where the family takes any.
        """
        self.family, self.folder = family, folder
        self.config = with_targets(config, family)
        self.published = published(family, config.model.pretrained_model_name_or_path)
        arguments, kept = self.config.data.init_args, self.config.loss.preservation
        own = tuple(sizes) if sizes else self._usual_sizes(arguments, references)
        self.preserved_sizes = own  # of the pairs of loss.preservation, where they have sizes of their own
        if not sizes and kept.weight > 0 and kept.dataset_path is not None:
            others = arguments.model_copy(update={"dataset_path": kept.dataset_path})
            self.preserved_sizes = self._usual_sizes(others, references)
        self.own_sizes = own
        self.sizes = max(own, self.preserved_sizes, key=lambda each: each[0][0] * each[0][1])  # those of the peak
        self.text_tokens = family.text_tokens(self.sizes[1:])
        self.format = self._format()
        self._others: dict[torch.dtype, Estimator] = {}  # by the precision of the weights that are trained

    @property
    def footprint(self) -> Footprint:
        """That of the largest pairs."""
        return self._footprint(self.sizes)

    def summed(self, preserves: bool, of: Callable[[Footprint, bool], float]) -> float:
        """Something of all passes of a micro-batch.

        Args:
            preserves: whether there are those of loss.preservation, whose pairs may have another size.
            of: the same of a footprint, without and with those passes.
        """
        found = of(self._footprint(self.own_sizes), False)
        if preserves:
            second = self._footprint(self.preserved_sizes)
            found += of(second, True) - of(second, False)
        return found

    def _footprint(self, sizes: tuple[Size, ...]) -> Footprint:
        """Measured once in a process: only the geometry, the adapter and the model decide it."""
        about = transformer_config(self.family, self.folder, self.published)
        lora, rows = self.config.model.lora, self.config.data.batch_size
        dtypes = weight_dtype(self.config.train.mixed_precision), trained_dtype(self.config)
        tokens = self.family.text_tokens(sizes[1:])
        key = (type(self.family), repr(about), sizes, rows, tokens, repr(lora), *dtypes)
        if key not in _footprints:
            batch = stand_in(self.family, about, sizes, rows, tokens)
            _footprints[key] = footprint(self.family, about, batch, lora, *dtypes)
        return _footprints[key]

    def estimate(self, config: Config | None = None, format: str | None = None) -> Estimate:
        """What a run takes.

        Args:
            config: with other settings than the estimator's; "auto" in it counts as 0.
            format: of the frozen base; default: what checkpoint and configuration say.
        """
        config = config or self.config
        if (dtype := trained_dtype(config)) != trained_dtype(self.config):  # of which the footprint is another
            if dtype not in self._others:
                self._others[dtype] = Estimator(self.family, config, self.folder, self.sizes)
            return self._others[dtype].estimate(config, format)
        train, found, keep = config.train, self.footprint, config.train.recomputation_keeps
        outside, blocks = self._weights(config, format or self.format)
        in_blocks = sum(kind.count * size for kind, size in zip(found.kinds.values(), blocks, strict=True))
        swapped = min(train.blocks_to_swap, found.num_blocks) if isinstance(train.blocks_to_swap, int) else 0
        on_host = in_blocks * swapped // found.num_blocks
        visiting = max(blocks) * min(swapped, 1 + AHEAD)
        largest = max(found.kinds.values(), key=lambda kind: kind.saved)
        offloads = train.offload_activations
        # Of int8, products are kept as they are summed, in 32 bits.
        twice = (format or self.format) == "int8" and keep not in (None, "none")
        kept = found.kept(keep) + twice * (found.kept(keep) - found.kept(0.0))
        average = 4 * (found.weights if config.model.lora is None else found.adapter) * train.ema.enabled
        average_waits = train.ema.device == "cpu"
        device = {
            "weights": outside + in_blocks - on_host + visiting,
            **self._trained(config),
            AVERAGE: 0 if average_waits else average,
            "kept activations": 0 if offloads else kept,
            "the block at work": AT_WORK * largest.inputs + (largest.saved if keep is not None else 0),
        }
        # The two are page-locked in other ways: swapped blocks take what they need, torch's tensors powers of two.
        wide = twice * (found.kept_on_host(keep) - found.kept_on_host(0.0))
        activations = found.kept_on_host(keep) + wide if offloads else 0
        host = {"swapped blocks": on_host, "activations": activations, AVERAGE: average if average_waits else 0}
        host["the program"] = PROGRAM
        encoders = self.encoders(config)
        if not config.cache.use_cache:
            (host if train.low_memory else device)["encoders"] = encoders
        on_cpu = all(getattr(config.cache, f"{name}_device") == "cpu" for name in ENCODER_PARTS)
        encoding = self.encoding(config) if config.cache.use_cache else 0
        before = {"encoders, while they encode": encoding if on_cpu else 0}
        device, host, before = ({key: size for key, size in part.items() if size} for part in (device, host, before))
        operations = int(self.summed(config.loss.preserves, lambda one, both: one.operations(keep, both)))
        return Estimate(device, host, before, 0 if on_cpu else encoding, operations)

    def _weights(self, config: Config, format: str | None) -> tuple[int, list[int]]:
        """Bytes of the weights outside of the blocks, and of those of one block of each kind."""
        frozen = weight_dtype(config.train.mixed_precision)
        wide = (trained_dtype(config) if config.model.lora is None else frozen).itemsize
        narrow = BYTES[format] if format is not None else wide
        if format is not None and format == self._stored_in_file:
            narrow = self._mean_bytes(narrow, wide)
        found = self.footprint
        kinds = found.kinds.values()
        blocks = [int(kind.linear * narrow + (kind.weights - kind.linear) * wide) for kind in kinds]
        return found.weights_outside * wide, blocks

    def _trained(self, config: Config) -> dict[str, int]:
        """Bytes of the adapter, of gradients, and of the optimizer's state; weights trained themselves are counted."""
        found = self.footprint
        state = STATE.get(config.optimizer.class_path.rpartition(".")[2], ADAM)
        if config.model.lora is not None:
            return {"adapter": 4 * found.adapter, "gradients": 4 * found.adapter, "optimizer": state * found.adapter}
        released = config.train.release_gradients
        largest = max(kind.weights for kind in found.kinds.values())
        size = trained_dtype(config).itemsize
        parts = {"gradients": size * (largest if released else found.weights), "optimizer": state * found.weights}
        if size < 4:  # its float32 values, gradient and update, and the random numbers that it is rounded by
            parts["the weight that is updated"] = 16 * found.largest
        return parts

    def encoding(self, config: Config | None = None) -> int:
        """Bytes at the peak of encoding: the encoders, or, alone, the VAE with the largest picture or a tile of it."""
        config = config or self.config
        itemsize = encoder_dtype(config.train.mixed_precision).itemsize
        pixels = max(width * height for width, height in self.sizes)
        if config.model.vae_tiling and pixels > tiling.ABOVE:
            pixels = tiling.TILE**2
        files = [] if self.folder is None else (self.folder / "vae").glob("*.safetensors")
        vae = sum(path.stat().st_size for path in files) or int(VAE_PARAMETERS * itemsize)
        return max(self.encoders(config), vae + self.family.vae_pixel_bytes * pixels * itemsize // 2)

    def encoders(self, config: Config | None = None) -> int:
        """Bytes of the encoders and the VAE, as files say or as they are published."""
        config = config or self.config
        dtype, narrow = encoder_dtype(config.train.mixed_precision), config.model.text_format
        files = [] if self.folder is None else sorted(self.folder.glob("*/*.safetensors"))
        files = [path for path in files if path.parent.name != "transformer"]
        if files:
            spared = sum(_quantisable(path) for path in files if path.parent.name.startswith("text_encoder"))
            whole = sum(path.stat().st_size for path in files)
        else:
            spared = int(self.published.encoder_quantisable * (dtype.itemsize - BYTES["fp8"]))
            whole = int(self.published.encoder_parameters * dtype.itemsize)
        return whole if narrow is None else whole - spared

    def _format(self) -> str | None:
        if self.folder is None and self.config.model.transformer_file is None:
            return self.config.model.asked_format
        return base_precision((self.folder or Path()) / "transformer", self.config.model).format

    @cached_property
    def _stored_in_file(self) -> str | None:
        """The format in which model.transformer_file has some of its layers already."""
        path = self.config.model.transformer_path
        found = None if path is None else file_format(path)
        return None if found is None else found[0]

    def _mean_bytes(self, narrow: float, wide: int) -> float:
        """Of one weight in the matrices of the blocks of model.transformer_file, of which some may be wide.

        Args:
            narrow, wide: those of a weight that is quantised, and of another.
        """
        file = transformer_file(self.family, self.config.model)
        assert file is not None
        tensors = file.tensors().items()
        inside = [one for key, one in tensors if key.endswith(".weight") and len(one.shape) == 2 and numbered(key)[1]]
        weights = sum(math.prod(one.shape) for one in inside)
        quantised = sum(math.prod(one.shape) for one in inside if one.dtype not in ("F32", "F16", "BF16"))
        return narrow if not weights else (quantised * narrow + (weights - quantised) * wide) / weights

    def _usual_sizes(self, arguments: DatasetArguments, references: int | None) -> tuple[Size, ...]:
        (width, height), area = arguments.largest
        sizes = usual_sizes(self.family, self.family.size(width, height, area))
        return sizes if references is None else sizes[:1] * (1 + references)


def _quantisable(path: Path) -> int:
    """Bytes of a text encoder's file that model.quantize_text_encoders spares."""
    return sum(
        int(math.prod(one.shape) * (WIDTHS[one.dtype] - BYTES["fp8"]))
        for key, one in header(path).items()
        if one.dtype in WIDTHS and len(one.shape) == 2 and IN_BLOCKS.search(key)
    )


def trained_dtype(config: Config) -> torch.dtype:
    """Precision of the weights that are trained."""
    return PRECISION[config.train.weight_precision if config.model.lora is None else "fp32"]


def published(family: Family, name: str) -> Published:
    """The checkpoint of the family that is called `name` on the hub; for other names the family's first."""
    return next((one for one in family.published if one.name.lower() == name.lower()), family.published[0])


def transformer_config(family: Family, folder: Path | None, published: Published | None = None) -> dict[str, Any]:
    """config.json of the transformer; without a checkpoint, that of a published one."""
    if folder is not None:
        about: dict[str, Any] = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        about.pop("quantization_config", None)
        return about
    parameters = inspect.signature(family.transformer.__init__).parameters
    about = {name: value.default for name, value in parameters.items() if name != "self"}
    return {**about, **(published or family.published[0]).transformer}
