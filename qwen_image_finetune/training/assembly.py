"""The model as it learns: the transformer with every lever in its written order, and what updates it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_image_finetune import levers, loading
from qwen_image_finetune.levers import parallel
from qwen_image_finetune.levers.attention import attention_of
from qwen_image_finetune.levers.compile import compilation_of
from qwen_image_finetune.levers.release import GradientRelease
from qwen_image_finetune.levers.single_steps import RoundedSteps, SingleSteps
from qwen_image_finetune.lora import adapters
from qwen_image_finetune.lora import files as lora_files
from qwen_image_finetune.training import trained
from qwen_image_finetune.training.average import Average
from qwen_image_finetune.training.data_parallel import wrap
from qwen_image_finetune.training.job import Job
from qwen_image_finetune.training.optim import TwoModes, build_optimizer, build_scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from diffusers import ModelMixin
    from torch.optim.lr_scheduler import LambdaLR

OVERFLOWS_IN_A_ROW = 20  # each halves the scale of fp16, which starts at 2^16: more are no matter of the scale


@dataclass
class Learner:
    """A transformer, what is trained of it, and its optimizer."""

    accelerator: Accelerator
    transformer: ModelMixin  # without the wrappers of several processes
    wrapped: nn.Module  # the same as the loop calls it: in several processes it averages gradients
    parameters: list[nn.Parameter]  # that are trained
    optimizer: Any  # accelerate's wrapper, which holds back steps whose fp16 gradients overflowed
    schedule: LambdaLR
    max_norm: float | None = None  # of the change of a weight
    average: Average | None = None  # in the processes that validate or save
    rounded: RoundedSteps | None = None  # of weights in bfloat16
    released: GradientRelease | None = None
    overflows: int = 0  # steps in a row whose fp16 gradients overflowed
    _compiled: int = -1  # graphs that were spoken of; none is worth a word too

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return float(self.optimizer.param_groups[0]["lr"])

    def release_gradients(self) -> None:
        """The last of the levers: update each weight during the backward pass. The optimizer has its state by then."""
        self.released = GradientRelease(self.rounded or SingleSteps(self.optimizer.optimizer), self.parameters)

    def gradient_norm(self, limit: float | None) -> float:
        """Norm of all gradients, which are scaled down to `limit` where they exceed it."""
        if self.released is not None:
            return float(self.released.take_norm())
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit or math.inf)
        return float(parallel.whole(norm))

    @contextmanager
    def as_used(self) -> Iterator[None]:
        """The weights that samples and checkpoints have; of most optimizers those that are trained.

        A schedule-free optimizer computes them from those that it trains, which come back to the bit.
        """
        optimizer = self.optimizer.optimizer
        if not isinstance(optimizer, TwoModes):
            yield
            return
        kept = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)

    @property
    def trains_others(self) -> bool:
        """Whether the weights that are trained are not those that are to be used."""
        return isinstance(self.optimizer.optimizer, TwoModes)

    def take_average(self, step: int) -> None:
        """Take the weights into the moving average, if there is one and that is due."""
        if self.average is not None and self.average.is_due(step):
            with self.as_used():
                self.average.take()

    def learn(self, loss: float, gradient_norm: float) -> bool:
        """One optimizer step, and one of the schedule. What is not finite changes no weight.

        Args:
            loss, gradient_norm: of this step, the same in all processes.

        Returns:
            Whether the step was sound. fp16 gradients overflow now and then by design: the gradient scaler skips such a
            step, and makes the next one's gradients smaller. A long row of overflows is no such thing.
        """
        scaler, finite = self.accelerator.scaler, math.isfinite(gradient_norm)
        self.overflows = 0 if finite or scaler is None else self.overflows + 1
        sound = math.isfinite(loss) and (finite or 0 < self.overflows < OVERFLOWS_IN_A_ROW)
        if sound:  # without fp16 the wrapper has nothing to hold back, and costs time at every call
            (self.rounded or (self.optimizer if scaler is not None else self.optimizer.optimizer)).step()
            if self.max_norm is not None:
                adapters.limit_norms(self.transformer, self.max_norm)
        elif scaler is not None:
            scaler.update()  # else it takes the next step's gradients for unscaled
        if self.rounded is not None:
            self.rounded.number += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return sound

    def newly_compiled(self) -> str | None:
        """A sentence about train.compile, whenever it compiled more since the last call."""
        compilation = compilation_of(self.transformer)
        if compilation is None or compilation.num_graphs == self._compiled:
            return None
        self._compiled = compilation.num_graphs
        return compilation.words()


def assemble(job: Job, resume: Path | None) -> Learner:
    """Load the transformer and make it ready to learn, in the order that `levers` gives reasons for.

    Args:
        resume: the checkpoint that the run goes on from, whose adapter this one must be like; without one it is filled
            from model.lora.pretrained_weight, if that is given.

    Raises:
        ConfigError: the checkpoint, the adapter and the levers do not fit each other or this machine.
    """
    config, device = job.config, job.accelerator.device
    transformer = _load(job)
    lora = config.model.lora
    start = None if lora is None or resume is not None else lora.pretrained_weight
    levers.prepare(transformer, config, device, _other_ranks(job, transformer, resume, start))
    job.say(f"attention: {attention_of(transformer)}")
    if start is not None:
        trained.start_from(start, transformer, job.family.naming, config.model)
    _place(job, transformer)
    transformer.train()

    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.optimizer, parameters, *trained.other_rate(transformer, config.model))
    schedule = build_scheduler(config.lr_scheduler, optimizer, job.total_steps)
    job.team.meet("loading the transformer")
    in_bfloat16 = config.train.weight_precision == "bf16"
    return Learner(
        accelerator=job.accelerator,
        transformer=transformer,
        parameters=parameters,
        optimizer=job.accelerator.prepare(optimizer),
        wrapped=transformer if job.sharding else wrap(job.accelerator, transformer, job.family, lora, job.blind),
        schedule=schedule,
        rounded=RoundedSteps(optimizer, config.train.seed) if in_bfloat16 else None,
        max_norm=None if lora is None else lora.max_norm,
        average=Average(config, transformer) if config.train.ema.enabled and (job.team.main or job.sharding) else None,
    )


def _other_ranks(job: Job, transformer: ModelMixin, resume: Path | None, start: str | None) -> dict[str, int]:
    """Ranks of modules that are not model.lora.r, by the checkpoint or the LoRA that the run goes on from."""
    lora = job.config.model.lora
    if lora is None or (resume is None and start is None):
        return {}
    if resume is not None:
        return {name: rank for name, rank in trained.ranks(resume).items() if lora.rank_pattern or rank != lora.r}
    assert start is not None
    return lora_files.check_lora(transformer, start, job.family.naming, lora)


def _load(job: Job) -> ModelMixin:
    """The frozen transformer, quantised as it is read; without memory where processes will share it."""
    dtype = loading.weight_dtype(job.config.train.mixed_precision)
    if job.sharding is not None:
        return loading.empty_transformer(job.family, job.folder, dtype)
    swapped = job.config.train.blocks_to_swap
    assert isinstance(swapped, int), "a run's plan has settled it"
    return loading.load_transformer(
        job.family, job.folder, dtype, job.config.model, job.accelerator.device, swapped, job.say
    )


def _place(job: Job, transformer: ModelMixin) -> None:
    """Adapters onto the device of their base; a shared model is cut, and each process reads its part."""
    device = job.accelerator.device
    if job.sharding is not None:
        dtype = loading.weight_dtype(job.config.train.mixed_precision)
        parallel.shard(transformer, job.sharding, device)
        source = loading.transformer_file(job.family, job.config.model) or job.folder / "transformer"
        change = loading.base_change(job.family, job.folder, job.config.model)
        parallel.fill(transformer, source, dtype, device, change)
    elif job.config.train.blocks_to_swap == 0:
        transformer.to(device)
