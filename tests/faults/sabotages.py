"""Faults that are put into the process of a run before it begins, by name."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def report_phases(pipe: Connection) -> None:
    """Say when the run begins to load, to cache an entry, to train a step, to save and to draw."""
    from qwen_image_finetune import loading
    from qwen_image_finetune.disk import checkpoint, runs
    from qwen_image_finetune.encoding import cache, store
    from qwen_image_finetune.machine import signals
    from qwen_image_finetune.training import validate

    def announced(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def announce(*arguments: Any, **options: Any) -> Any:
            pipe.send(name)
            return call(*arguments, **options)

        return announce

    store.Store.write = announced("caching", store.Store.write)  # type: ignore[method-assign]
    checkpoint.staged_folder = announced("saving", checkpoint.staged_folder)
    loading.load_transformer = announced("loading", loading.load_transformer)
    runs.Run.record = announced("step", runs.Run.record)  # type: ignore[method-assign]
    runs.remove_folder = announced("removing", runs.remove_folder)
    validate.Validation.__call__ = announced("drawing", validate.Validation.__call__)  # type: ignore[method-assign]
    cache.fill = announced("filling", cache.fill)
    handle = signals.StopSignals.__init__

    def installed(self: signals.StopSignals) -> None:
        handle(self)
        pipe.send("begun")

    signals.StopSignals.__init__ = installed  # type: ignore[method-assign]


def clock(offset: str) -> None:
    """Set the clock of the process to another time: seconds from now."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + float(offset)
    time.time_ns = lambda: real_ns() + int(float(offset) * 1e9)


def slow_steps(seconds: str) -> None:
    """Make every step take at least so long, and every sampler step as well."""
    from qwen_image_finetune import flow

    call = flow.noisy_latents

    def slow(*arguments: Any) -> Any:
        time.sleep(float(seconds))
        return call(*arguments)

    flow.noisy_latents = slow
    steps = flow.set_timesteps

    def slow_sampling(*arguments: Any) -> Any:
        for each in steps(*arguments):
            time.sleep(float(seconds))
            yield each

    flow.set_timesteps = slow_sampling


def die_in_a_round(where: str) -> None:
    """SIGKILL in a round of validation: "number of the round,round|loss|best|samples|line"; ahead of the first, then
    behind one of its losses, behind best.json, behind the samples, and behind its line in metrics.jsonl."""
    from qwen_image_finetune.disk import runs
    from qwen_image_finetune.training import held_out_loss, validate, verdict

    number, place = where.split(",")
    rounds = [0]

    def die(*_: Any) -> None:
        if rounds[0] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    def then_die(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            die()
            return result

        return run

    begin = validate.Validation.__call__

    def counted(self: validate.Validation, *arguments: Any) -> bool:
        rounds[0] += 1
        if place == "round":
            die()
        return begin(self, *arguments)

    validate.Validation.__call__ = counted  # type: ignore[method-assign]
    if place == "loss":
        held_out_loss.HeldOutLoss.__call__ = then_die(held_out_loss.HeldOutLoss.__call__)  # type: ignore[method-assign]
    elif place == "best":
        verdict.Best.offer = then_die(verdict.Best.offer)  # type: ignore[method-assign]
    elif place == "samples":
        validate.samples.save = then_die(validate.samples.save)
    elif place == "line":
        runs.Run.record = then_die(runs.Run.record)  # type: ignore[method-assign]


def slow_save(seconds: str) -> None:
    """Make a checkpoint take at least so long to write."""
    from qwen_image_finetune.disk import checkpoint

    call = checkpoint.save_state

    def slow(*arguments: Any) -> Any:
        time.sleep(float(seconds))
        return call(*arguments)

    checkpoint.save_state = slow


def no_memory(place: str) -> None:
    """Raise what torch or Python raise when memory runs out: "cuda|cpu|host,module:attribute.path,call number"."""
    kind, path, count = place.split(",")
    module_name, _, names = path.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parts, name = names.split(".")
    for part in parts:
        owner = getattr(owner, part)
    call, left = getattr(owner, name), [int(count)]

    def fail(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise {
                "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
                "host": MemoryError(),
            }[kind]
        return call(*arguments, **options)

    setattr(owner, name, fail)


def no_model(place: str) -> None:
    """Fail where any model is loaded."""
    from qwen_image_finetune import loading

    def fail(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    loading.load_encoders = loading.load_transformer = fail


def not_finite(places: str) -> None:
    """NaN or Inf in the loss, or in the gradient of one parameter: "loss|gradient,nan|inf,first call,last call"."""
    from qwen_image_finetune import flow
    from qwen_image_finetune.training.objective import Objective

    where, value, first, last = places.split(",")
    calls = {"count": 0}

    def now() -> bool:
        return int(first) <= calls["count"] <= int(last)

    loss = flow.loss

    def poisoned_loss(*arguments: Any, **options: Any) -> Any:
        calls["count"] += 1
        found = loss(*arguments, **options)
        return found * float(value) if where == "loss" and now() else found

    flow.loss = poisoned_loss
    call, hooked = Objective.__call__, []

    def hook_once(self: Objective, *arguments: Any) -> Any:
        if where == "gradient" and not hooked:
            parameter = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad][-1]
            hooked.append(parameter.register_hook(lambda grad: grad * float(value) if now() else grad))
        return call(self, *arguments)

    Objective.__call__ = hook_once  # type: ignore[method-assign]


def time_saving(unused: str) -> None:
    """Print how long each checkpoint held the loop up, how long the copy in it took, and how long it took to write."""
    from qwen_image_finetune.disk import checkpoint
    from qwen_image_finetune.training import logbook, state

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measure(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments, **options)
            print(f"{name} took {time.perf_counter() - began:.6f} s", flush=True)
            return result

        return measure

    state.State.snapshot = timed("copying", state.State.snapshot)  # type: ignore[method-assign]
    state.State.write = timed("writing", state.State.write)  # type: ignore[method-assign]
    logbook.Logbook.save = timed("blocking", logbook.Logbook.save)  # type: ignore[method-assign]
    checkpoint.CheckpointWriter.wait = timed("waiting", checkpoint.CheckpointWriter.wait)  # type: ignore[method-assign]
