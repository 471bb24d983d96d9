"""One copy of the model shared by all processes: FSDP2 of torch, as accelerate's launch configuration asks for it.

Every block of the transformer is a unit: its weights are cut along their first dimension, 1/n in each process, and
gathered only while the block runs; gradients come back cut. What is left (embeddings, the last layers) is one more
unit. Adapters are cut with the blocks they sit in, so optimizer state is cut as well. `fully_shard` is called here and
not by `Accelerator.prepare`, which does it on cards only: so the same code runs, and is tested, on the CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from qwen_image_finetune.config import Config, ConfigError
from qwen_image_finetune.disk import checkpoint
from qwen_image_finetune.levers.model_files import opened
from qwen_image_finetune.levers.single_file import SingleFile
from qwen_image_finetune.levers.stored_precision import Precision
from qwen_image_finetune.lora.merging import Change

ASKED = "ACCELERATE_USE_FSDP"
QUANTISED = (
    "FSDP2 cuts weights by rows, and knows nothing of the codes and scales of a quantised layer. The whole "
    "base is only 1/2 to 1/4 as large: train it with configs/accelerate/ddp.yaml"
)


@dataclass(frozen=True)
class Sharding:
    """What the launch configuration says about FSDP2."""

    blocks: tuple[str, ...] = ()  # classes of the units; empty: those the model names itself
    reshard_after_forward: bool = True  # gather the weights again in the backward pass


@cache
def requested() -> Sharding | None:
    """The sharding that accelerate's launch configuration asks for, read once; None for none.

    accelerate is not left to see it: it would cut modules itself, on cards only, and transformers would load the
    encoders without weights.

    Raises:
        ConfigError: it asks for something that is not done here.
    """
    if os.environ.pop(ASKED, "").lower() != "true":
        return None
    from accelerate import FullyShardedDataParallelPlugin

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("fsdp_config.fsdp_version: 1 is not used here; write 2, as in configs/accelerate/fsdp2.yaml")
    plugin = FullyShardedDataParallelPlugin()
    refused = {
        "fsdp_offload_params: true": (
            os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true",
            "shards stay on their devices; more processes make them smaller",
        ),
        "fsdp_activation_checkpointing: true": (
            bool(plugin.activation_checkpointing),
            "train.gradient_checkpointing=true does that",
        ),
        "fsdp_auto_wrap_policy: SIZE_BASED_WRAP": (
            bool(plugin.min_num_params),
            "the blocks of the model are the units: write TRANSFORMER_BASED_WRAP",
        ),
    }
    problems = [f"fsdp_config.{key} is refused: {why}" for key, (is_so, why) in refused.items() if is_so]
    if problems:
        raise ConfigError("\n".join(problems))
    return Sharding(tuple(plugin.transformer_cls_names_to_wrap or ()), bool(plugin.reshard_after_forward))


def check(sharding: Sharding | None, config: Config, processes: int) -> None:
    """Refuse what cannot be shared, before anything is loaded.

    Raises:
        ConfigError: says what, and what to do.
    """
    if sharding is None:
        return
    if processes == 1:
        raise ConfigError(
            "the launch configuration asks for FSDP, but one process runs, which has nobody to share the model with: "
            "start several, or take configs/accelerate/one_card.yaml"
        )
    if config.model.quantize:
        raise ConfigError(f"model.quantize with FSDP: {QUANTISED}, or set model.quantize=false")
    if config.train.offload_activations:
        raise ConfigError(
            "train.offload_activations with FSDP: weights that are gathered for a block would be taken for its "
            "activations and copied to the host; use train.gradient_checkpointing"
        )
    if config.train.weight_precision == "bf16":
        raise ConfigError(
            "train.weight_precision=bf16 with FSDP: weights are widened one after the other, of which a process has a "
            "part; float32 weights are shared by all processes as it is, so set train.weight_precision=fp32"
        )
    if config.train.mixed_precision == "fp16":
        raise ConfigError("train.mixed_precision=fp16 with FSDP: loss scaling needs whole gradients; use bf16")
    if not config.optimizer.class_path.startswith("torch.optim."):
        raise ConfigError(
            f"optimizer.class_path={config.optimizer.class_path} with FSDP: it reads the bytes of whole weights, of "
            "which a process has a part; use one of torch.optim, such as torch.optim.AdamW"
        )
    if config.optimizer.class_path.endswith((".Muon", ".Adafactor")):
        raise ConfigError(
            f"optimizer.class_path={config.optimizer.class_path} with FSDP: it looks at whole matrices, of which a "
            "process has some rows; use torch.optim.AdamW, or train with configs/accelerate/ddp.yaml"
        )
    lora = config.model.lora
    if lora is not None and lora.use_dora:
        raise ConfigError(
            "model.lora.use_dora=true with FSDP: its file holds lengths of the base's rows, of which the process "
            "that writes it has a part; train it with configs/accelerate/ddp.yaml"
        )
    start = "" if lora is None else str(lora.initialisation)
    if start.startswith(("pissa", "olora")):
        raise ConfigError(
            f"model.lora.init_lora_weights={start!r} with FSDP takes the base apart, of which a "
            'process has a part; use true, "gaussian" or "orthogonal"'
        )


def check_base(sharding: Sharding | None, folder: Path, precision: Precision) -> None:
    """Refuse to share a base that came quantised: read without its scales it would be another model.

    Args:
        folder: of the transformer, or the file.
        precision: what `base_precision` says about it.

    Raises:
        ConfigError: says how the checkpoint is quantised, and what to do.
    """
    if sharding is not None and precision.format is not None:
        raise ConfigError(
            f"the weights in {folder} are {precision.format} ({precision.source}), with FSDP: {QUANTISED}, or name a "
            "checkpoint in full precision"
        )


def shard(transformer: nn.Module, sharding: Sharding, device: torch.device) -> None:
    """Cut every weight of the transformer over all processes, in place. The last of the levers.

    Weights may be without memory (on the device "meta"): they stay so, cut; `fill` then reads each process its part.

    Raises:
        ConfigError: the classes of blocks are not in the model.
    """
    named = sharding.blocks or tuple(cast(Any, transformer)._no_split_modules or ())
    blocks = [module for module in transformer.modules() if type(module).__name__ in named]
    if not blocks:
        raise ConfigError(
            f"fsdp_config.fsdp_transformer_layer_cls_to_wrap={','.join(sharding.blocks)!r} is in no module of "
            f"{type(transformer).__name__}; leave it out: the model says which blocks are its units"
        )
    # Nothing changes the output of a transformer in place: packing, the loss and the sampler make new tensors.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    name = type(transformer).__name__
    fully_shard(transformer, mesh=mesh)  # makes it an FSDP{name}, a word that files of the model must not bear
    type(transformer).__name__ = name


def is_sharded(transformer: nn.Module) -> bool:
    """Whether `shard` has cut its weights over the processes."""
    return isinstance(transformer, FSDPModule)


def fill(
    transformer: nn.Module,
    source: Path | SingleFile,
    dtype: torch.dtype,
    device: torch.device,
    change: Change | None = None,
) -> None:
    """Give cut weights without memory their values: each process reads its own part of each tensor of the files.

    Adapters must have their values already; they are small and made alike in every process.

    Args:
        source: a folder in diffusers layout, or one file.
        dtype: that the unshared model would be loaded in; values are rounded to it, whatever they are kept in.
        change: is added before they are.

    Raises:
        ConfigError: files are missing or broken, or a tensor is missing or of another shape.
    """
    filled: dict[str, Tensor] = {}
    with opened(source) as files:
        for name, parameter in transformer.named_parameters():
            if not parameter.is_meta:
                continue
            key = name.replace(".base_layer.", ".")
            if key not in files.tensors or files.tensors[key].shape != tuple(parameter.shape):
                raise ConfigError(
                    f"{files.source}: {key} is missing or not {tuple(parameter.shape)}, as config.json has it"
                )
            assert isinstance(parameter, DTensor)
            begin, rows = _own_rows(parameter)
            part = files.read(key)[begin : begin + rows].to(device)
            if change is not None and key.endswith(".weight") and change.touches(key.removesuffix(".weight")):
                part = change.added_to(key.removesuffix(".weight"), part, begin)
            part = part.to(dtype).to(parameter.dtype, copy=True)
            filled[name] = _as_cut(part, parameter)
    transformer.load_state_dict(filled, strict=False, assign=True)  # FSDP takes notice of what is assigned
    whole = [name for name, parameter in transformer.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise RuntimeError(f"{len(whole)} weights, such as {whole[0]}, are not shared by the processes")


def _own_rows(parameter: DTensor) -> tuple[int, int]:
    """(first row, number of rows) of this process's part, cut along the first dimension."""
    rank, size = parameter.device_mesh.get_local_rank(), parameter.device_mesh.size()
    longest = -(-parameter.shape[0] // size)  # as torch.chunk cuts: full parts first, the last ones short or empty
    return min(rank * longest, parameter.shape[0]), parameter.to_local().shape[0]


def _as_cut(part: Tensor, pattern: DTensor) -> DTensor:
    """This process's rows as a tensor that is cut like `pattern`."""
    mesh, shape = pattern.device_mesh, pattern.shape
    return DTensor.from_local(part, mesh, pattern.placements, run_check=False, shape=shape, stride=pattern.stride())


# State of cut tensors, as files keep it


def whole(tensor: Tensor) -> Tensor:
    """A cut tensor put together, on its device, for which all processes call this; any other as it is."""
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor


def host_copy(tensor: Tensor, keep: bool) -> Tensor | None:
    """A copy of a whole tensor in host memory; all processes call it, `keep` says who gets it."""
    found = whole(tensor)
    if not keep:
        return None
    return checkpoint.host_copy(tensor) if found is tensor else found.cpu()


def cut_like(value: Tensor, pattern: Tensor) -> Tensor:
    """A copy of this process's part of a whole tensor where `pattern` is cut; all processes have the same `value`."""
    if not isinstance(pattern, DTensor):
        return value
    begin, rows = _own_rows(pattern)
    return _as_cut(value[begin : begin + rows].to(pattern.device, copy=True), pattern)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a cut tensor, in the same memory; any other as it is."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def cut_as(part: Tensor, pattern: Tensor) -> Tensor:
    """This process's part as a tensor that is cut like `pattern`, on its device; as it is where that is whole."""
    return _as_cut(part.to(pattern.device), pattern) if isinstance(pattern, DTensor) else part


def forget_gathered(transformer: nn.Module) -> None:
    """Let the next forward pass gather weights anew: for whoever changes the parts other than by an optimizer."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cut_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state_dict of an optimizer, its whole tensors cut like the parameters that they belong to; all are copies."""
    parameters = [tensor for group in optimizer.param_groups for tensor in group["params"]]

    def cut_or_copied(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return cut_like(value, parameter) if value.shape == parameter.shape else value.clone()

    cut = {
        index: {name: cut_or_copied(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": cut}
