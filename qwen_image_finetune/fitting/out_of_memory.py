"""Memory that ran out, said in terms of what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen_image_finetune.config import Config

# How torch words a failed allocation on the CPU, where it has no exception class of its own.
_ON_CPU = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
# How advice begins that is refused where processes share one model (levers.parallel.check, job.check_sharing).
_OF_WHOLE_MODELS = ("train.offload_activations=true", "train.blocks_to_swap", "train.low_memory", "model.quantize",
                    "optimizer.class_path=bitsandbytes", "train.release_gradients")  # fmt: skip


class OutOfMemory(RuntimeError):
    """A device or the host has too little memory for what the configuration asks; nothing was changed silently."""


@contextmanager
def explained(config: Config, doing: str, shared: bool = False) -> Iterator[None]:
    """Raise OutOfMemory in place of whatever torch or Python raise when memory runs out in the block.

    Args:
        doing: what the process is at, such as "loading the transformer".
        shared: processes share one model (FSDP).
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):  # the former is explained already
            raise
        where = str(error).strip().partition("\n")[0] or type(error).__name__
        on_card = isinstance(error, torch.OutOfMemoryError)
        changes = "".join(f"\n  - {change}" for change in advice(config, doing, on_card, shared))
        words = f"memory ran out while {doing} ({where}). What would help, least loss first:{changes}"
        raise OutOfMemory(words) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host; torch says the latter in words alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_CPU)


def advice(config: Config, doing: str, on_card: bool = True, shared: bool = False) -> list[str]:
    """What could be changed and is not yet, in the order of what it costs: nothing, time, precision, then capacity.

    Args:
        doing: what the process was at: it decides what is in memory, and so what would leave it.
        on_card: the card's memory ran out; False: the host's, where whatever leaves the card waits.
        shared: processes share one model (FSDP), which excludes much.
    """
    if "predict" in doing:
        return list(_for_drawing(config))
    where = [*_for_everything(config, doing)]
    if "encod" not in doing:
        where += _for_the_transformer(config, on_card, stepping="sampl" not in doing and "load" not in doing)
    lines = [words for _, words in sorted(where, key=lambda choice: choice[0])]
    return [words for words in lines if not (shared and words.startswith(_OF_WHOLE_MODELS))]


def _for_drawing(config: Config) -> Iterator[str]:
    """What helps prediction, where neither activations are kept nor gradients made."""
    yield "close other programs that use this memory"
    if not config.train.low_memory:
        yield "train.low_memory=true: text encoders and transformer take turns on the card; same pictures"
    if config.predict.devices.text_encoder != "cpu":
        yield "predict.devices.text_encoder=cpu (and text_encoder_2): slower, the same pictures but for rounding"
    if config.train.mixed_precision == "no":
        yield "train.mixed_precision=bf16: half the memory, rounding of bf16"
    if config.model.asked_format is None:
        yield "model.quantize=fp8: a base of 8 bits in place of 16, rounded"
    if config.model.asked_format in (None, "fp8", "int8"):
        yield "model.quantize=nf4: a base of 4 bits, rounded more"
    yield "a smaller picture: --width and --height"


# What a change costs, least first. Within one of them the order is that of the lists below.
NOTHING, TIME, CLIPPING, ROUNDING, MORE_ROUNDING, CAPACITY = range(6)
Choice = tuple[int, str]


def _for_everything(config: Config, doing: str) -> Iterator[Choice]:
    """What helps wherever memory ran out."""
    encoding, cached = "encod" in doing, config.cache.use_cache
    yield NOTHING, "close other programs that use this memory"
    if not cached:
        yield NOTHING, "cache.use_cache=true: the encoders leave before training begins; same result"
    if "sampl" in doing:
        yield NOTHING, "validation.enabled=false: the samples can be drawn afterwards with `qif predict`"
    places = config.cache if cached else config.train
    if encoding and not all(place == "cpu" for place in (places.vae_encoder_device, places.text_encoder_device)):
        section = "cache" if cached else "train"
        yield TIME, f"{section}.text_encoder_device=cpu, and the same for the VAE: slower, same result"
    if encoding and config.model.text_format is None:
        yield ROUNDING, "model.quantize_text_encoders=true: half the memory of the text encoders, rounding of int8"
    if config.data.num_workers > 0:
        yield TIME, "data.num_workers=0: less host memory; slower, same result"
    if config.train.mixed_precision == "no":
        yield ROUNDING, "train.mixed_precision=bf16: half the memory, rounding of bf16"
    yield CAPACITY, "a smaller data.init_args.resolution (or image_size): less detail is learnt"


def _for_the_transformer(config: Config, on_card: bool, stepping: bool) -> Iterator[Choice]:
    """What makes the transformer and its training smaller.

    Args:
        stepping: a training step ran; else there were neither activations nor gradients.
    """
    train, lora, batch = config.train, config.model.lora, config.data.batch_size
    swapped, recomputed = train.blocks_to_swap != 0 or train.low_memory, train.gradient_checkpointing
    if stepping and not recomputed:
        yield TIME, "train.gradient_checkpointing=true: products are computed twice, attention is not; same result"
    if stepping and recomputed and train.keep_activations != "none":
        yield TIME, "train.keep_activations=none: everything is computed twice; same result"
    if stepping and batch > 1:
        accumulated = batch * train.gradient_accumulation_steps
        words = f"data.batch_size=1 with train.gradient_accumulation_steps={accumulated}"
        yield TIME, f"{words}: slower, same gradients"
    if on_card and stepping and not train.offload_activations:
        yield TIME, "train.offload_activations=true: activations wait in host memory; slower, same result"
    if on_card and lora is not None and not swapped:
        needed = ["train.gradient_checkpointing=true"] * (not recomputed) + ["train.compile=false"] * bool(
            train.compile
        )
        words = " with ".join(["train.blocks_to_swap=auto", *needed])
        yield TIME, f"{words}: weights wait in host memory; slower, same result"
    if on_card and not config.cache.use_cache and not train.low_memory:
        yield TIME, "train.low_memory=true: the encoders run on the CPU, weights wait in host memory; same result"
    if not on_card and train.offload_activations:
        yield TIME, "train.offload_activations=false: what waits in host memory stays on the card; same result"
    if not on_card and train.blocks_to_swap != 0:
        yield TIME, "train.blocks_to_swap lower: fewer weights wait in host memory; same result"
    if stepping and lora is None and not train.release_gradients:
        words = "train.release_gradients=true with train.max_grad_norm=null"
        yield CLIPPING, f"{words}: a weight's gradient is gone once used, and none is clipped"
    if stepping and "8bit" not in config.optimizer.class_path:
        yield ROUNDING, "optimizer.class_path=bitsandbytes.optim.AdamW8bit: a quarter of AdamW's state, rounded"
    if lora is not None and not config.model.quantize:
        yield ROUNDING, "model.quantize=fp8: a base of 8 bits in place of 16, rounded"
    if lora is not None and config.model.asked_format in ("fp8", "int8"):
        yield MORE_ROUNDING, "model.quantize=nf4: a base of 4 bits, rounded more"
    if lora is None:
        yield CAPACITY, "model.lora (instead of null): an adapter needs a fraction of the memory of full fine-tuning"
    elif lora.r > 4:
        yield CAPACITY, f"model.lora.r below {lora.r}: less is learnt"
