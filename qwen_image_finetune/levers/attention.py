"""Which attention runs: chosen and named, never left to what a library prefers.

torch's own choice on Hopper is cuDNN, whose backward has failed there with illegal memory accesses, and with NaN
gradients at some lengths (pytorch#190321, pytorch#196678); it is none of the choices here.

- flash4: FlashAttention-4 (package flash-attn-4), Hopper and Blackwell, 16 bits. One operator forward and one backward,
  so that compiling a block is not interrupted by its just-in-time compiler.
- flash: FlashAttention-2 as torch brings it, Ampere and newer, 16 bits; on the CPU torch's kernel of the same kind.
- efficient: torch's memory-efficient attention, for older cards and float32.
- math: plain matrix products, the reference.

Rows of unequal prompts come with a mask. The two flash kernels take none on a card: `efficient` steps in for these
batches. Batches without padding, such as all of one sample, have no mask and lose nothing.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qwen_image_finetune.config import ConfigError

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DISPATCHER = "dispatch_attention_fn"  # what the attention of diffusers' newer transformers calls
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """An attention of ours, where diffusers keeps the name of one of its own.

    No string: compilers do not see through the `str` of a class of strings, and would leave the block eager.
    """

    name: str


def use_attention(transformer: nn.Module, asked: str, mixed_precision: str) -> str:
    """Let `transformer` attend as `asked` on the device it is on; returns the name of what runs.

    Args:
        asked: auto, or a name from above.
        mixed_precision: no, bf16 or fp16: in which queries, keys and values arrive.

    Raises:
        ConfigError: that attention does not run here, or the model does not let itself be told.
    """
    name = choose(asked, _home(transformer), DTYPES[mixed_precision])
    module: Any = sys.modules[type(transformer).__module__]
    processors = _processors(transformer)
    if DISPATCHER not in vars(module) or not processors:
        raise ConfigError(f"train.attention={asked!r}: {type(transformer).__name__} has an attention of its own")
    module.dispatch_attention_fn = _routed(vars(module)[DISPATCHER])
    for processor in processors:
        processor._attention_backend = Choice(name)
    return name


def attention_of(transformer: nn.Module) -> str | None:
    """What `use_attention` chose; None where it was not called."""
    backends = {vars(processor).get("_attention_backend") for processor in _processors(transformer)}
    return next((backend.name for backend in backends if isinstance(backend, Choice)), None)


def choose(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention that runs on `device` in `dtype`; "auto" is the fastest one.

    Raises:
        ConfigError: the one that was asked for does not.
    """
    able = _able(device, dtype)
    if asked == "auto":
        return able[0]
    if asked not in able:
        raise ConfigError(
            f"train.attention={asked!r} does not run on {_words(device)} in {str(dtype).removeprefix('torch.')}; "
            f"there are {able}, and auto takes {able[0]}"
        )
    return asked


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """Attention of every token to every token that is not masked.

    Args:
        query, key, value: (B, T, heads, D).
        mask: bool, true for keys that are attended to, broadcast to (B, heads, T, T); None attends to all.

    Returns:
        (B, T, heads, D), in the dtype of the query, or autocast's.
    """
    if torch.is_autocast_enabled(query.device.type):  # what autocast does for torch's attention, and only for that
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if name == "flash4" and mask is None:
        # By its name: a compiler ignores caches, and would trace (and fail at) the definition of the operators.
        operator: Any = torch.ops.qif.flash_attention_4
        output: Tensor = operator(query.contiguous(), key.contiguous(), value.contiguous())[0]
        return output
    if mask is not None and query.is_cuda and name in ("flash4", "flash"):
        name = "efficient"
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with sdpa_kernel(KERNELS[name]):
        return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def _processors(transformer: nn.Module) -> list[Any]:
    """What computes the attention of each block."""
    return [part.processor for part in transformer.modules() if isinstance(part, Attention | AttentionModuleMixin)]


def _home(transformer: nn.Module) -> torch.device:
    """Where it will run: where it is, or, while its weights have no memory, the accelerator of this process."""
    device = next(transformer.parameters()).device
    if device.type != "meta":
        return device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _able(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What runs there, fastest first."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ["flash", "math"] if device.type == "cpu" else ["math"]
    capability = torch.cuda.get_device_capability(device)
    able = ["efficient", "math"]
    if dtype in SIXTEEN_BITS and capability >= (8, 0):
        able.insert(0, "flash")
    if dtype in SIXTEEN_BITS and capability >= (9, 0) and _flash_4_interface() is not None:
        flash_attention_4()  # defines the operators that `attend` calls
        able.insert(0, "flash4")
    return able


def _words(device: torch.device) -> str:
    return (
        "the CPU"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else str(device)
    )


def _routed(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """diffusers' dispatcher, but for attentions that were told a choice of ours; models that were not keep theirs."""
    if getattr(theirs, "routes_choices", False):
        return theirs

    def dispatch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        backend: Any = None,
        **options: Any,
    ) -> Any:
        if isinstance(backend, Choice):
            return attend(query, key, value, attn_mask, backend.name)
        return theirs(query, key, value, attn_mask, backend=backend, **options)

    dispatch.routes_choices = True  # type: ignore[attr-defined]
    return dispatch


# FlashAttention-4


@functools.cache
def _flash_4_interface() -> Any:
    """Its forward and backward functions, None where the package is not installed, or not whole."""
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except (ImportError, RuntimeError):  # by the latter its compiler says that a part of it is missing
        return None


@functools.cache
def flash_attention_4() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlashAttention-4 as operators of torch: (B, T, heads, D) each, 16 bits.

    "attention" is in their names because that is how recomputation knows what is worth keeping.
    """
    from torch.utils.flop_counter import register_flop_formula

    interface = _flash_4_interface()

    @torch.library.custom_op("qif::flash_attention_4", mutates_args=())
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, logsumexp = interface._flash_attn_fwd(query, key, value, return_lse=True)[:2]
        return output, logsumexp

    @torch.library.custom_op("qif::flash_attention_4_backward", mutates_args=())
    def backward(
        query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = interface._flash_attn_bwd(query, key, value, output, gradient, logsumexp)
        return gradients[0], gradients[1], gradients[2]

    @forward.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, _ = query.shape
        return _like(query), query.new_empty(batch, heads, tokens, dtype=torch.float32)

    @backward.register_fake
    def _(
        query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _like(query), _like(key), _like(value)

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
        return backward(*ctx.saved_tensors, gradient.contiguous())

    forward.register_autograd(differentiate, setup_context=keep)

    @register_flop_formula(torch.ops.qif.flash_attention_4)
    def _(query: Any, key: Any, *_: Any, **__: Any) -> int:
        return 2 * _products(query, key)

    @register_flop_formula(torch.ops.qif.flash_attention_4_backward)
    def _(query: Any, key: Any, *_: Any, **__: Any) -> int:
        return 5 * _products(query, key)

    return lambda query, key, value: forward(query.contiguous(), key.contiguous(), value.contiguous())[0]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _products(query: Any, key: Any) -> int:
    """Operations of one of the products of attention, from the shapes of query and key: multiply and add."""
    batch, tokens, heads, width = query
    return 2 * batch * heads * tokens * key[1] * width
