"""Whether a run fits a card: memory predicted from shapes, and the cheapest change that makes it fit.

What is counted: weights where they lie, the adapter or the masters with gradients and optimizer state, what blocks keep
for the backward pass, the block that is at work, and the encoders while they encode. Compared with measured runs in
docs/performance.md.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_image_finetune import speed
from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.config.exclusions import contradictions
from qwen_image_finetune.config.schema import shown
from qwen_image_finetune.config.tree import find
from qwen_image_finetune.families.base import Family
from qwen_image_finetune.footprint import Footprint, footprint, stand_in
from qwen_image_finetune.host_memory import free_host_memory
from qwen_image_finetune.levers.stored_precision import base_precision
from qwen_image_finetune.levers.swap import AHEAD

GIB = 2**30
Size = tuple[int, int]

# Bytes of one weight inside the blocks, scales included (one float32 a row of 3072; blocks of 64, scales in 8 bits).
BYTES = {"fp8": 1.0013, "int8": 1.0013, "nf4": 0.516, "fp4": 0.516}
# Bytes of optimizer state for each trained weight; what is not listed is taken for Adam's two float32.
STATE = {"SGD": 0, "Adafactor": 0, "Adam8bit": 2, "AdamW8bit": 2, "PagedAdam8bit": 2, "PagedAdamW8bit": 2,
         "Lion8bit": 1, "Lion": 4, "Prodigy": 16}  # fmt: skip
ADAM = 8
# What a block needs beside what it keeps, in inputs of the block: gradients on their way, temporary results. Ten is
# what eager runs of both architectures at full size left over (docs/performance.md).
AT_WORK = 10
# Outside of what torch allocates: the driver's context, libraries, the fragments between tensors.
OUTSIDE = GIB
# Of the host, of each process: libraries, the driver, what is read ahead.
PROGRAM = 4 * GIB
TEXT_TOKENS = 512  # what Kontext pads prompts to; measured steps have as many, whatever the family
KEEPS: tuple[float | None, ...] = (None, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
# Parameters of encoders and VAE in the published checkpoints, for those that are not at hand.
ENCODERS = {"FluxKontext": 4.97e9, "QwenImageEdit": 8.42e9, "QwenImageEditPlus": 8.42e9}

ENCODER_PARTS = ("text_encoder", "text_encoder_2", "vae_encoder")

# What makes each part that waits on the host smaller, at the least cost.
HOST_REMEDIES = {
    "swapped blocks": "a base of fewer bits is smaller, and swaps less or nothing (docs/precision.md)",
    "activations": "train.offload_activations=false",
    "encoders": "cache.use_cache=true",
    "encoders, while they encode": "cache.text_encoder_device and the like without cpu",
    "the program": "close other programs",
}


@dataclass(frozen=True)
class Prediction:
    """Peak bytes, by what they are for."""

    device: dict[str, int]
    host: dict[str, int]
    host_before: dict[str, int]  # on the host before training, one after the other
    encoding: int  # on the device while the data set is encoded, if that happens there
    operations: int  # floating-point operations of one forward and backward pass

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
        return max(self.peak, self.encoding) + OUTSIDE <= card


@dataclass(frozen=True)
class Change:
    """Keys that are set anew, and what that costs."""

    keys: dict[str, Any]
    price: str

    def words(self, config: Config) -> str:
        """As overrides of a command line, but for those that `config` has already."""
        values = config.model_dump()
        news = {key: value for key, value in self.keys.items() if find(values, key) != value}
        return " ".join(f"{key}={shown(value).strip(chr(39))}" for key, value in news.items())


class Planner:
    """Predictions for one model, one geometry and any settings."""

    def __init__(
        self, family: Family, config: Config, folder: Path | None, sizes: Sequence[Size] | None = None
    ) -> None:
        """
        Args:
            folder: of the checkpoint; None where it is not on this machine: the published model is taken for it.
            sizes: (width, height) of target and references; without them, one reference at the size that is set.
        """
        self.family, self.config, self.folder = family, config, folder
        self.sizes = tuple(sizes) if sizes else self._usual_sizes()
        self.text_tokens = family.text_tokens(self.sizes[1:])
        self.format = self._format()
        self._footprint: Footprint | None = None

    @property
    def footprint(self) -> Footprint:
        """Measured once: only the geometry, the adapter and the model decide it."""
        if self._footprint is None:
            about = transformer_config(self.family, self.folder)
            batch = stand_in(self.family, about, self.sizes, self.config.data.batch_size, self.text_tokens)
            self._footprint = footprint(self.family, about, batch, self.config.model.lora, _dtype(self.config))
        return self._footprint

    def predict(self, config: Config | None = None, format: str | None = None) -> Prediction:
        """What a run takes.

        Args:
            config: with other settings than the planner's; "auto" in it counts as 0.
            format: of the frozen base; default: what checkpoint and configuration say.
        """
        config = config or self.config
        train, found = config.train, self.footprint
        kept_as = None if not train.gradient_checkpointing else train.keep_activations
        keep = 0.0 if kept_as == "auto" else kept_as
        weights = self._weights(config, format or self.format)
        kinds = list(found.kinds.values())
        total = sum(kind.count for kind in kinds)
        largest = max(kinds, key=lambda kind: kind.saved)
        swapped = min(train.blocks_to_swap, total) if isinstance(train.blocks_to_swap, int) else 0
        in_blocks = sum(kind.count * each for kind, each in zip(kinds, weights[1:], strict=True))
        host_weights = in_blocks * swapped // total
        visiting = max(weights[1:]) * min(swapped, 1 + AHEAD)
        kept = found.kept(keep)
        at_work = AT_WORK * largest.inputs + (largest.saved if keep is not None else 0)
        offloaded = kept if train.offload_activations else 0
        device = {
            "weights": weights[0] + in_blocks - host_weights + visiting,
            **self._trained(config),
            "kept activations": kept - offloaded,
            "the block at work": at_work,
        }
        encoders = self._encoders()
        host = {"swapped blocks": host_weights, "activations": offloaded, "the program": PROGRAM}
        if not config.cache.use_cache:
            (host if train.low_memory else device)["encoders"] = encoders
        on_cpu = all(getattr(config.cache, f"{name}_device") == "cpu" for name in ENCODER_PARTS)
        encoding = encoders if config.cache.use_cache else 0
        before = {"encoders, while they encode": encoding if on_cpu else 0}
        device, host, before = ({key: size for key, size in part.items() if size} for part in (device, host, before))
        return Prediction(device, host, before, 0 if on_cpu else encoding, found.operations(keep))

    def cheapest_change(self, card: int) -> tuple[Change, Prediction] | None:
        """The first of `changes` with which the run fits; None if nothing helps enough."""
        for change, changed, format in self.changes(card):
            prediction = self.predict(changed, format)
            if prediction.fits(card):
                return change, prediction
        return None

    def changes(self, card: int) -> Iterator[tuple[Change, Config, str | None]]:
        """What can be changed, in the order of what it costs: nothing, time, precision."""
        config, base, prices = self.config, dict[str, Any](), []
        if not config.cache.use_cache:
            base["cache.use_cache"] = True
            prices.append("nothing: the encoders leave before training begins")
        if self._encoders() + OUTSIDE > card:
            base |= dict.fromkeys((f"cache.{name}_device" for name in ENCODER_PARTS), "cpu")
            prices.append("time, once: the data set is encoded on the CPU")
        if base:
            yield Change(base, "; ".join(prices)), with_keys(config, base), None
        for lossy, losses in self._losses():
            for keys, price in self.memory_changes():
                together = {**base, **lossy, **keys}
                changed = with_keys(config, together)
                yield Change(together, "; ".join([*prices, *losses, price])), changed, lossy.get("model.quantize")

    def _losses(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Settings that change what is learnt, and what is lost by them: first nothing, then the least."""
        yield {}, []
        if self.config.model.lora is not None:
            for format in () if self.format else ("fp8", "nf4"):
                yield {"model.quantize": format}, ["precision of the frozen base"]
            return
        released = {"train.release_gradients": True, "train.max_grad_norm": None}
        rounded = {"optimizer.class_path": "bitsandbytes.optim.AdamW8bit"}
        optimizer, clipping, rounding = self.config.optimizer, "gradients are not clipped", "the optimizer's precision"
        # The other class takes the same arguments, but has another default of lr.
        can_round = optimizer.class_path == "torch.optim.AdamW" and "init_args" in optimizer.model_fields_set
        can_release = not contradictions(with_keys(self.config, released))
        if can_release:
            yield released, [clipping]
        if can_round:
            yield rounded, [rounding]
        if can_release and can_round:
            yield {**released, **rounded}, [clipping, rounding]

    def fastest_that_fits(self, card: int) -> tuple[Change, Prediction] | None:
        """The setting of the memory levers that loses the least time, results unchanged."""
        for keys, price in self.memory_changes():
            prediction = self.predict(with_keys(self.config, keys))
            if prediction.fits(card):
                return Change(keys, price), prediction
        return None

    def memory_changes(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Settings of recomputation and swapping, the fastest first."""
        for keep in KEEPS:
            yield _recompute(keep), "time: a part is computed twice" if keep is not None else "nothing"
        yield _recompute("none"), "time: the whole forward pass is computed twice"
        if self.config.model.lora is not None:
            total = sum(kind.count for kind in self.footprint.kinds.values())
            for swapped in range(1, total + 1):
                keys = {**_recompute("none"), "train.blocks_to_swap": swapped, "train.compile": False}
                yield keys, "time: twofold computing, and weights that are fetched"
        yield {**_recompute("none"), "train.offload_activations": True}, "time: twofold computing, activations fetched"

    def _weights(self, config: Config, format: str | None) -> list[int]:
        """Bytes of the weights outside of the blocks, and of one block of each kind."""
        wide = 4 if config.model.lora is None else _dtype(config).itemsize
        narrow = BYTES[format] if format is not None else wide
        found = self.footprint
        kinds = found.kinds.values()
        blocks = [int(kind.linear * narrow + (kind.weights - kind.linear) * wide) for kind in kinds]
        return [found.weights_outside * wide, *blocks]

    def _trained(self, config: Config) -> dict[str, int]:
        found = self.footprint
        state = STATE.get(config.optimizer.class_path.rpartition(".")[2], ADAM)
        if config.model.lora is not None:
            return {"adapter": 4 * found.adapter, "gradients": 4 * found.adapter, "optimizer": state * found.adapter}
        released = config.train.release_gradients
        largest = max(kind.weights for kind in found.kinds.values())
        return {"gradients": 4 * (largest if released else found.weights), "optimizer": state * found.weights}

    def _encoders(self) -> int:
        """Bytes of the encoders and the VAE, as files say or as they are published."""
        dtype = torch.bfloat16 if self.config.train.mixed_precision == "bf16" else torch.float32
        files = [] if self.folder is None else self.folder.glob("*/*.safetensors")
        found = sum(path.stat().st_size for path in files if path.parent.name != "transformer")
        return found or int(ENCODERS.get(self.family.name, 0) * dtype.itemsize)

    def _format(self) -> str | None:
        if self.folder is not None:
            return base_precision(self.folder / "transformer", self.config.model).format
        return self.config.model.asked_format

    def _usual_sizes(self) -> tuple[Size, ...]:
        arguments = self.config.data.init_args
        width, height = arguments.image_size or (arguments.resolution or 1024,) * 2
        size = self.family.size(width, height, arguments.area)
        return (size, size)


def settled(
    config: Config,
    family: Family,
    folder: Path | None,
    sizes: Sequence[Size],
    card: int | None,
    processes: int = 1,
) -> tuple[Config, str | None]:
    """The configuration with every "auto" of memory decided for a card, and what to say of it.

    Args:
        folder: of the checkpoint; None: see Planner.
        sizes: of the largest sample, target first.
        card: its free bytes; None without a card.
        processes: that share this machine's host memory.

    Raises:
        ConfigError: blocks would have to be swapped, which the configuration excludes; or nothing fits.
    """
    if card is None:
        keys: dict[str, Any] = {name: 0.0 if "keep" in name else 0 for name, value in _autos(config) if value == "auto"}
        untuned = keys or config.train.memory == "auto"
        return with_keys(config, keys), "no card here: memory is not tuned" if untuned else None
    planner = Planner(family, config, folder, sizes)
    if asks(config):
        config, sentence = decided(planner, card)
        expected = planner.predict(config)
    else:
        expected = planner.predict()
        sentence = f"{expected.peak / GIB:.1f} GiB expected on the card, {card / GIB:.1f} are free"
        if not expected.fits(card):
            sentence += ": it may not fit; `qif plan` says what would"
    return config, "\n".join([sentence, *host_warnings(expected, processes)])


def host_warnings(prediction: Prediction, processes: int = 1) -> Iterator[str]:
    """A line if this machine has less host memory left than a run needs: the system would end it without a word."""
    parts, free = prediction.host_parts, free_host_memory()
    needed = processes * sum(parts.values())
    if free is None or needed <= free:
        return
    largest = max(parts, key=lambda name: parts[name])
    yield (
        f"warning: needs {needed / GIB:.1f} GiB of host memory, {free / GIB:.1f} are free: the system may end the run "
        f"without a word. Most is {largest} ({processes * parts[largest] / GIB:.1f}): {HOST_REMEDIES[largest]}"
    )


def asks(config: Config) -> bool:
    """Whether something about memory is left to be decided for the card."""
    train = config.train
    keep = train.gradient_checkpointing and train.keep_activations == "auto"
    return train.memory == "auto" or _swapping(config) or keep


class NothingFits(ConfigError):
    """Nothing that may be decided makes the run fit."""


def decided(planner: Planner, card: int) -> tuple[Config, str]:
    """The planner's configuration with every "auto" of memory decided for a card of so many bytes, and a sentence.

    Raises:
        ConfigError: blocks would have to be swapped, which the configuration excludes.
        NothingFits: with no choice.
    """
    config, train = planner.config, planner.config.train
    if train.memory == "auto":
        found = planner.fastest_that_fits(card)
        if found is None:
            raise _nothing_fits(config, card, "train.memory=auto")
        change, prediction = found
        chosen = {key: value for key, value in change.keys.items() if key != "train.memory"}
        words = Change(chosen, "").words(config) or "nothing to change"
        return with_keys(config, change.keys), f"memory: {words} ({prediction.peak / GIB:.1f} GiB expected)"
    keeps = [*KEEPS[1:], "none"] if train.keep_activations == "auto" else [train.keep_activations]
    total = sum(kind.count for kind in planner.footprint.kinds.values())
    swaps = range(total + 1) if _swapping(config) else [train.blocks_to_swap]
    for swapped in swaps:
        if swapped and not train.gradient_checkpointing:
            raise ConfigError(
                "the card is too small for all blocks, and blocks are swapped with train.gradient_checkpointing=true "
                "only: set that"
            )
        for keep in keeps:
            keys: dict[str, Any] = {"train.blocks_to_swap": swapped, "train.keep_activations": keep}
            if swapped:
                keys["train.compile"] = False  # they exclude each other, and without swapping nothing fits
            prediction = planner.predict(with_keys(config, keys))
            if prediction.fits(card):
                words = Change(keys, "").words(config) or "nothing to change"
                return with_keys(config, keys), f"memory: {words} ({prediction.peak / GIB:.1f} GiB expected)"
    raise _nothing_fits(config, card, "every block swapped" if _swapping(config) else "everything computed twice")


def _swapping(config: Config) -> bool:
    train = config.train
    low = train.low_memory and train.blocks_to_swap == 0 and config.model.lora is not None  # what learns is not swapped
    return low or train.blocks_to_swap == "auto"


def _autos(config: Config) -> list[tuple[str, Any]]:
    train = config.train
    return [("train.blocks_to_swap", train.blocks_to_swap), ("train.keep_activations", train.keep_activations)]


def _nothing_fits(config: Config, card: int, tried: str) -> NothingFits:
    return NothingFits(
        f"{tried}: even so the run does not fit the {card / GIB:.0f} GiB of this card; `qif plan CONFIG` says what "
        f"would, such as {last_resort(config)}"
    )


def last_resort(config: Config) -> str:
    """What is left where neither time nor memory on the host makes a run fit."""
    if config.model.lora is None:
        return (
            "model.lora in place of null, for an adapter needs a fraction of it, or the model shared over several "
            "cards (configs/accelerate/fsdp2.yaml)"
        )
    base = "" if config.model.quantize else "a quantised base (model.quantize), "
    return f"{base}a smaller data.init_args.resolution or data.batch_size"


def transformer_config(family: Family, folder: Path | None) -> dict[str, Any]:
    """config.json of the transformer; without a checkpoint, the published model's, which are its class's defaults."""
    if folder is not None:
        about: dict[str, Any] = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        about.pop("quantization_config", None)
        return about
    parameters = inspect.signature(family.transformer.__init__).parameters
    about = {name: value.default for name, value in parameters.items() if name != "self"}
    if "pooled_projection_dim" in about:  # FLUX.1's [dev] models; the class's default is [schnell]
        about["guidance_embeds"] = True
    return about


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24GiB" or "24": cards are named by GB and have GiB.

    Raises:
        ConfigError: it is no such amount, or one that no card has.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) <= 1000:
        known = ", ".join(card.name for card in speed.CARDS)
        raise ConfigError(
            f"--card {text!r} is no amount of memory of a card; write it like 24GB (`qif plan` also takes {known})"
        )
    return int(float(match[1]) * GIB)


def card_memory() -> int | None:
    """Free bytes of the card of this process, with what torch has of it already; None without a card."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def _recompute(keep: float | str | None) -> dict[str, Any]:
    if keep is None:
        return {"train.gradient_checkpointing": False, "train.memory": "as_written"}
    return {"train.gradient_checkpointing": True, "train.keep_activations": keep, "train.memory": "as_written"}


def with_keys(config: Config, keys: dict[str, Any]) -> Config:
    """The configuration with other values; what was said about it stays said."""
    changed = config
    for key, value in keys.items():
        section, _, name = key.partition(".")
        part = getattr(changed, section).model_copy(update={name: value})
        changed = changed.model_copy(update={section: part})
    return changed


def _dtype(config: Config) -> torch.dtype:
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]
