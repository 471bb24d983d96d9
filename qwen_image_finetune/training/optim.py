"""Optimizers by import path, and learning rate schedules counted in optimizer steps."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qwen_image_finetune.config import ConfigError, OptimizerConfig, SchedulerConfig, import_class

KEY = "optimizer.init_args"
# Arguments that choose an implementation of the same update; whoever gives one has said what they want.
FUSED_ON = ("cuda", "cpu", "mps", "xpu")
IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}

MUON = "pytorch_optimizer.Muon"  # torch's own takes matrices alone


@runtime_checkable
class TwoModes(Protocol):
    """An optimizer without a schedule: gradients are taken at other weights than those that are to be used
    (Defazio et al., "The road less scheduled", 2024)."""

    def eval(self) -> None:
        """Put the weights that are to be used into the model."""

    def train(self) -> None:
        """Put those back that gradients are taken at."""


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[Tensor], faster: Iterable[Tensor] = (), ratio: float = 1.0
) -> Optimizer:
    """The configured optimizer over `parameters`; Adam and AdamW fused where torch has that for the device.

    A fused update is one call for all weights in place of several for each, which on small weights, such as those of
    adapters, are what an update costs. A resume goes on with the update that the checkpoint was made with.

    Args:
        faster: of `parameters`, those with another learning rate: the optimizer's times `ratio`.

    Raises:
        ConfigError: the class is no optimizer, or does not take the arguments it is given.
    """
    optimizer_class: type[Optimizer] = import_class(config.class_path, "optimizer.class_path", Optimizer)
    trained = list(parameters)
    if not trained:
        raise ConfigError("nothing is trainable: model.lora.target_modules matches no module of the transformer")
    if inspect.signature(optimizer_class.step).parameters["closure"].default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer.class_path={config.class_path} evaluates the loss several times a step, which this trainer "
            "does not do; use a first-order optimizer such as torch.optim.AdamW"
        )
    arguments = _checked_arguments(config, optimizer_class)
    if optimizer_class in (torch.optim.Adam, torch.optim.AdamW) and not IMPLEMENTATIONS & set(arguments):
        arguments["fused"] = all(tensor.device.type in FUSED_ON for tensor in trained) or None
    apart = {id(tensor) for tensor in faster} if ratio != 1.0 else set()
    groups = [[tensor for tensor in trained if (id(tensor) in apart) is second] for second in (False, True)]
    split = _by_shape if config.class_path == MUON else _as_one
    try:
        optimizer = optimizer_class([group for members in groups for group in split(members)], **arguments)
        for group in optimizer.param_groups:
            if id(group["params"][0]) in apart:
                group["lr"] *= ratio
        if isinstance(optimizer, TwoModes):
            optimizer.train()
        return optimizer
    except (TypeError, ValueError, IndexError) as error:  # the last one of torch, for a single beta
        raise ConfigError(f"{KEY}={config.init_args} is refused by {config.class_path}: {error}") from error


def _as_one(tensors: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": tensors}] if tensors else []


def _by_shape(tensors: list[Tensor]) -> list[dict[str, Any]]:
    """Groups for `MUON`: matrices for itself, and the rest for the AdamW that comes with it."""
    parts = {kind: [tensor for tensor in tensors if (tensor.ndim >= 2) is kind] for kind in (True, False)}
    return [{"params": members, "use_muon": kind} for kind, members in parts.items() if members]


def build_scheduler(config: SchedulerConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The configured schedule of diffusers, to be stepped once per optimizer step.

    Args:
        total_steps: optimizer steps of the whole run, where decaying schedules end.

    Raises:
        ConfigError: the schedule cannot be built with this learning rate.
    """
    from diffusers import optimization

    name, warmup = config.scheduler_type, config.warmup_steps
    total = max(total_steps, warmup + 1)  # a run that ends within its warm-up never reaches the decay
    cycles = config.num_cycles
    if name == "cosine":  # get_scheduler drops num_cycles here
        return optimization.get_cosine_schedule_with_warmup(
            optimizer, warmup, total, num_cycles=0.5 if cycles is None else cycles
        )
    try:
        return optimization.get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total,
            num_cycles=1 if cycles is None else int(cycles),
            power=config.power,
        )
    except ValueError as error:
        raise ConfigError(f"lr_scheduler.scheduler_type={name}: {error}") from error


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer with what it belongs to: its class and the shapes of its parameters.

    Here and in `restore_optimizer`, `optimizer` is the optimizer itself, not a wrapper of accelerate's around it.
    """
    return {"class": _class_path(optimizer), "shapes": _shapes(optimizer), "state": optimizer.state_dict()}


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> tuple[str, ...]:
    """Give `optimizer` the state that `optimizer_state` returned.

    Returns:
        A sentence for every option that the configuration sets to another value than the saved state: a resumed run
        goes on with the saved one.

    Raises:
        ConfigError: the state is that of another class of optimizer, or of other parameters.
    """
    if saved["class"] != _class_path(optimizer):
        raise ConfigError(
            f"optimizer.class_path={_class_path(optimizer)}, but the checkpoint was trained with {saved['class']}: "
            "resume with the same optimizer, or start a new run from its weights with model.lora.pretrained_weight"
        )
    if saved["shapes"] != _shapes(optimizer):
        found, wanted = _shapes(optimizer), saved["shapes"]
        raise ConfigError(
            f"the checkpoint holds the optimizer state of other parameters ({len(wanted)} tensors, this run trains "
            f"{len(found)}; the first difference: {_first_difference(wanted, found)}): resume with the model and "
            "model.lora settings that it was trained with"
        )
    notes = [
        f"{KEY}.{name}={ours!r} has no effect: the resumed run goes on with {theirs!r}"
        for group, other in zip(optimizer.param_groups, saved["state"]["param_groups"], strict=True)
        for name in optimizer.defaults
        if (ours := _option(group, name)) != (theirs := _option(other, name))
        and (name not in IMPLEMENTATIONS or None not in (ours, theirs))  # None left it to us, or to torch
        and name in inspect.signature(type(optimizer)).parameters
    ]
    with _widened(optimizer):
        optimizer.load_state_dict(saved["state"])
    return tuple(dict.fromkeys(notes))


@contextmanager
def _widened(optimizer: Optimizer) -> Iterator[None]:
    """Weights of fewer bits are stood in for by float32 ones: their state is float32, and torch would round it."""
    groups = optimizer.param_groups
    members = [group["params"] for group in groups]
    stand_ins: dict[int, Tensor] = {
        id(tensor): torch.nn.Parameter(torch.empty(0, device=tensor.device))
        for group in members for tensor in group if tensor.dtype == torch.bfloat16
    }  # fmt: skip
    for group, tensors in zip(groups, members, strict=True):
        group["params"] = [stand_ins.get(id(tensor), tensor) for tensor in tensors]
    try:
        yield
    finally:
        for group, tensors in zip(optimizer.param_groups, members, strict=True):
            group["params"] = tensors
        for tensor in (tensor for tensors in members for tensor in tensors):
            stand_in = stand_ins.get(id(tensor))
            if stand_in is not None and stand_in in optimizer.state:
                optimizer.state[tensor] = optimizer.state.pop(stand_in)


def _checked_arguments(config: OptimizerConfig, optimizer_class: type[Optimizer]) -> dict[str, Any]:
    """The arguments as the class takes them: lists become tuples, texts for numbers and unknown names are refused."""
    parameters = dict(inspect.signature(optimizer_class).parameters)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD][1:]
    arguments = {}
    for name, value in config.init_args.items():
        if name not in names and not open_ended:
            nearest = difflib.get_close_matches(name, names, 1)
            raise ConfigError(
                f"{KEY}.{name} is not an argument of {config.class_path}"
                f"{f'; did you mean {nearest[0]}?' if nearest else '.'} It takes {', '.join(names)}"
            )
        default = parameters[name].default if name in parameters else None
        _check_number(name, value, default)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return arguments


def _check_number(name: str, value: Any, default: Any) -> None:
    """Raises ConfigError where a number is wanted, going by the default, and a text or a truth value is given."""
    if isinstance(default, list | tuple):
        wanted, given = True, value if isinstance(value, list | tuple) else [value]
    else:
        wanted = name == "lr" or (isinstance(default, int | float) and not isinstance(default, bool))
        given = [value]
    for item in given if wanted else ():
        if isinstance(item, str) or (isinstance(item, bool) and not isinstance(default, int)):
            raise ConfigError(f"{KEY}.{name}={value!r} is not a number, such as {default!r}; write it without quotes")


def _option(group: Mapping[str, Any], name: str) -> Any:
    """An option as it was configured: the schedule changes lr and keeps what it began with as initial_lr."""
    value = group.get("initial_lr", group.get(name)) if name == "lr" else group.get(name)
    return tuple(value) if isinstance(value, list) else value


def _shapes(optimizer: Optimizer) -> list[list[int]]:
    return [list(tensor.shape) for group in optimizer.param_groups for tensor in group["params"]]


def _first_difference(wanted: list[list[int]], found: list[list[int]]) -> str:
    for index, (one, other) in enumerate(zip(wanted, found, strict=False)):
        if one != other:
            return f"tensor {index} was {one} and is {other}"
    return "their number"


def _class_path(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
