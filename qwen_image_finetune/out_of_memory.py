"""Memory that ran out, said in terms of what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen_image_finetune.config import Config

# How torch words a failed allocation on the CPU, where it has no exception class of its own.
_ON_CPU = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class OutOfMemory(RuntimeError):
    """A device or the host has too little memory for what the configuration asks; nothing was changed silently."""


@contextmanager
def explained(config: Config, doing: str) -> Iterator[None]:
    """Raise OutOfMemory in place of whatever torch or Python raise when memory runs out in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise_explained(error, config, doing)
        raise


def raise_explained(error: Exception, config: Config, doing: str) -> None:
    """Raises OutOfMemory if that is what `error` says.

    Args:
        doing: what the process was at, such as "loading the transformer".
    """
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):  # explained where it happened
        where = str(error).strip().partition("\n")[0] or type(error).__name__
        changes = "".join(f"\n  - {change}" for change in advice(config, doing))
        raise OutOfMemory(f"memory ran out while {doing} ({where}). What would help, least loss first:{changes}")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_CPU)


def advice(config: Config, doing: str) -> list[str]:
    """What could be changed and is not yet, in the order of what it costs: nothing, time, precision, then capacity."""
    train, lora = config.train, config.model.lora
    encoding, drawing = "encod" in doing, "sampl" in doing
    batch, accumulation = config.data.batch_size, train.gradient_accumulation_steps
    on_another_device = "cache.text_encoder_device" if config.cache.use_cache else "train.text_encoder_device"
    choices: list[tuple[bool, str]] = [
        (True, "close other programs that use this memory"),
        (not config.cache.use_cache, "cache.use_cache=true: the encoders leave before training begins; same result"),
        (encoding, f"{on_another_device}=cpu, and the same for the VAE: slower, same result"),
        (drawing, "validation.enabled=false: the samples can be drawn afterwards with `qif predict`"),
        (
            not encoding and not train.gradient_checkpointing,
            "train.gradient_checkpointing=true: about a third slower, same result",
        ),
        (
            not encoding and batch > 1,
            f"data.batch_size=1 with train.gradient_accumulation_steps={batch * accumulation}: slower, same gradients",
        ),
        (not train.low_memory, "train.low_memory=true: weights wait in host memory; slower, same result"),
        (config.data.num_workers > 0, "data.num_workers=0: less host memory; slower, same result"),
        (train.mixed_precision == "no", "train.mixed_precision=bf16: half the memory, rounding of bf16"),
        (
            not encoding and "8bit" not in config.optimizer.class_path,
            "optimizer.class_path=bitsandbytes.optim.Adam8bit: a quarter of Adam's state, rounded",
        ),
        (
            not encoding and lora is not None and not config.model.quantize,
            "model.quantize=true: an 8-bit base, rounded",
        ),
        (True, "a smaller data.init_args.resolution (or image_size): less detail is learnt"),
        (
            not encoding and lora is not None and lora.r > 4,
            f"model.lora.r below {lora.r if lora else 0}: less is learnt",
        ),
        (
            not encoding and lora is None,
            "model.lora (instead of null): an adapter needs a fraction of the memory of full fine-tuning",
        ),
    ]
    return [text for fits, text in choices if fits]
