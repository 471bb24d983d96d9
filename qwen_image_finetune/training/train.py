"""The only training loop, and the order in which a run is put together.

Its parts have a module each:

    job         what is known before any model loads: who takes part, the pairs, the order of batches, the length
    logbook     the version folder: metrics, curves, checkpoints, and how the run ended
    embeddings  a complete cache, or encoders that stay in memory
    assembly    the transformer with adapter and levers, its optimizer and schedule
    state       what a checkpoint holds and a resume gets back
    stream      samples, read before they are needed
    objective   noise, noise level and loss of a micro-batch
    validate    held-out losses and samples on the way
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from qwen_image_finetune import loading
from qwen_image_finetune.config import Config
from qwen_image_finetune.encoding.embeddings import prepare_embeddings, prepare_held_out
from qwen_image_finetune.fitting.out_of_memory import explained
from qwen_image_finetune.machine import console, journal, processes, terminal
from qwen_image_finetune.machine.signals import StopSignals, exit_code
from qwen_image_finetune.training import summary
from qwen_image_finetune.training.assembly import Learner, assemble
from qwen_image_finetune.training.job import Due, Job, open_job
from qwen_image_finetune.training.logbook import Logbook, memory_gib, open_logbook
from qwen_image_finetune.training.objective import Objective
from qwen_image_finetune.training.state import Progress, State
from qwen_image_finetune.training.stream import Loaded, micro_batches, sample_keys
from qwen_image_finetune.training.validate import Validation, open_validation

if TYPE_CHECKING:
    from accelerate import Accelerator

BAD_STEPS_IN_A_ROW = 3

NOT_FINITE = (
    "the loss or the gradients were not finite for three steps in a row; the weights of step {} are saved. Lower "
    "optimizer.init_args.lr, use train.mixed_precision=bf16, and look at the samples named above"
)

RELEASED_NOT_FINITE = (
    "the loss or the gradients of step {} were not finite, and train.release_gradients has used them already: continue "
    "from the last checkpoint, with a lower optimizer.init_args.lr or without train.release_gradients"
)


class TrainingStopped(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


def train(config: Config) -> Path | None:
    """Train as configured; returns the version folder (in the first process; None in the others).

    Raises:
        ConfigError, DataError, RunError: before any model is loaded.
        TrainingStopped: the loss or the gradients stay non-finite.
        DiskFull, OutOfMemory: the last checkpoint is intact.
        SystemExit: 143 after SIGTERM, SIGUSR1 or SIGHUP, 130 after SIGINT; if steps were done, in a checkpoint.
    """
    with StopSignals() as stopping, journal.recording():
        job, progress = open_job(config), Progress()
        with open_logbook(job, progress) as book:
            if book.done >= job.total_steps and not book.owes_round:
                progress.step = book.done
                job.say(f"{book.resume} is at step {book.done} of {job.total_steps}: nothing is left to train; to "
                        "go on, raise train.max_train_steps or train.num_epochs")  # fmt: skip
            else:
                _train(job, book, progress, stopping)
        if book.path is not None:
            console.frame("trained", summary.after(job, book.path))
            job.say(f"done: {book.path}")
        return book.path


def _train(job: Job, book: Logbook, progress: Progress, stopping: StopSignals) -> None:
    """Put the run together, and let it run."""
    config, shared = job.config, job.sharding is not None

    # Embeddings: from the cache, which is completed first, or from encoders that stay
    with explained(config, "encoding the data set" if config.cache.use_cache else "loading the encoders", shared):
        pipe = prepare_embeddings(config, job.rows, job.accelerator, job.say)
        for seen in (job.held_out, job.asked, job.preserved):
            if seen is not None:
                prepare_held_out(config, seen, job.accelerator, job.say)

    # The model, its optimizer, and the state of both
    with explained(config, "loading the transformer", shared):
        learner = assemble(job, book.resume)
        state = State(job, learner, progress, book.settings)
        if book.resume is not None:
            state.load(book.resume)
            job.say(f"continuing {book.resume} at step {progress.step}")
        if config.train.release_gradients:
            learner.release_gradients()
        job.say(f"{job.family.name}, {sum(p.numel() for p in learner.parameters):,} trained weights, "
                f"{len(job.rows.dataset)} pairs, {job.total_steps} steps -> {book.path}")  # fmt: skip
        if terminal.is_terminal(sys.stdout):
            console.frame(job.family.name, summary.before(job, book.path), shown=job.team.main)
        book.begin()
        constants = loading.load_scheduler(job.folder).config
        objective = Objective(config, job.family, learner.transformer, constants, job.accelerator)
        validation = open_validation(job, book, learner, objective, pipe)
        if validation is not None:
            validation.start(progress.step)
        job.team.meet("preparing to train")
    if book.owes_round:
        job.say(f"the validation of step {progress.step} was interrupted, and is made up for")
        _validate(job, book, validation, job.due(progress.step), lambda: False)

    with explained(config, "training", shared):
        stream = micro_batches(job, pipe, progress.step)
        stopping.defer()
        _loop(job, book, learner, state, objective, stream, validation, stopping)
        book.writer.wait()


def _loop(
    job: Job,
    book: Logbook,
    learner: Learner,
    state: State,
    objective: Objective,
    stream: Iterator[Loaded],
    validation: Validation | None,
    stopping: StopSignals,
) -> None:
    """One optimizer step after the other, from where the state is to the end of the run."""
    config, accelerator, team, progress = job.config, job.accelerator, job.team, state.progress
    first_step, outlook = progress.step, summary.Outlook(job)
    with (
        console.progress("training", job.total_steps, first_step, shown=team.main) as update,
        team.watched(patience(config).total_seconds()),
    ):
        while progress.step < job.total_steps:
            # The step
            began, learning_rate = time.monotonic(), learner.learning_rate
            losses, sigmas, waited = _accumulate(job, learner, objective, stream, progress.step)
            gradient_norm = learner.gradient_norm(config.train.max_grad_norm)
            (mean_loss, *preservation), stop = agree(accelerator, losses, stopping.received)
            sound = learner.learn(mean_loss, gradient_norm)
            if not sound and config.train.release_gradients:
                raise TrainingStopped(RELEASED_NOT_FINITE.format(progress.step + 1))
            progress.step += 1
            learner.take_average(progress.step)
            progress.bad_steps = 0 if sound else progress.bad_steps + 1
            if progress.step == first_step + 1:  # kernels are built, connections made: now nobody should be late
                processes.set_timeout(patience(config))

            # What is known of it
            book.writer.raise_if_failed()
            if compiled := learner.newly_compiled():
                job.say(f"step {progress.step}: {compiled}")
            values = {
                "loss": mean_loss,
                **({"preservation_loss": preservation[0]} if preservation else {}),
                "grad_norm": gradient_norm,
                "learning_rate": learning_rate,
                "epoch": job.batches.epoch_of(progress.step - 1),
                "step_seconds": time.monotonic() - began,
                "data_seconds": waited,
                "memory_gib": memory_gib(accelerator.device),
            }
            book.record(values, sigmas)
            update(
                progress.step, f"loss {mean_loss:.4f}, {values['memory_gib']:.1f} GiB", outlook(values, progress.step)
            )

            # Reasons to stop, each with everything saved
            if not sound:
                job.say(f"step {progress.step}: loss {mean_loss}, gradient norm {gradient_norm}: not learnt from; its "
                        f"samples were {', '.join(sample_keys(job, progress.step - 1))}")  # fmt: skip
                if progress.bad_steps == BAD_STEPS_IN_A_ROW:
                    progress.bad_steps = 0  # of a run that goes on from here
                    book.save(state, wait=True)
                    raise TrainingStopped(NOT_FINITE.format(progress.step - BAD_STEPS_IN_A_ROW))
            if stop:
                _stop(job, book, state, stop, saved=False)

            # A checkpoint, and a look at what was learnt
            last, due = progress.step == job.total_steps, job.due(progress.step)
            if due.saves:
                book.save(state, wait=last)
            if due.validates:
                whole = _validate(job, book, validation, due, lambda: stopping.received != 0)
                received = 0 if last and whole else stopping.received  # nothing is left to stop
                if stop := agree(accelerator, torch.zeros(1, device=accelerator.device), received)[1]:
                    _stop(job, book, state, stop, saved=due.saves)


def _accumulate(
    job: Job, learner: Learner, objective: Objective, stream: Iterator[Loaded], step: int
) -> tuple[Tensor, list[Tensor], float]:
    """Gradients of a step (0-based): of the mean loss over all its samples, in all micro-batches and processes.

    Returns:
        This process's part of that mean and, where the model's own answers are preserved, of that second term before it
        is weighted, (1,) or (2,) float32 on the device; the noise levels of its samples; the seconds until these were
        there, encoded or read.
    """
    accelerator, count = job.accelerator, job.config.train.gradient_accumulation_steps
    weight = job.config.loss.preservation.weight
    samples, others = (sum(len(micro.rows) for micro in each.at(step)) for each in
                       (job.batches, job.preserved_batches or job.batches))  # fmt: skip
    total, sigmas, waited = torch.zeros(1 + (weight > 0), device=accelerator.device), [], 0.0
    for place in range(count):
        job.team.enter(f"reading the samples of step {step + 1}")
        began = time.monotonic()
        micro, batch, preserved = next(stream)
        waited += time.monotonic() - began
        job.team.enter(f"computing step {step + 1}")
        last = place == count - 1
        with _sent(accelerator, learner, last and preserved is None):
            loss, sigma = objective(learner.wrapped, batch, micro)
            # Gradients are averaged over processes, each of which has its part of the sum.
            accelerator.backward(loss.sum() * job.team.size / samples)
        total[0] += loss.detach().sum() / samples
        sigmas.append(sigma)
        if preserved is not None:  # a backward pass of its own: what waits for the first one is gone by now
            with _sent(accelerator, learner, last):
                difference = objective.preservation(learner.wrapped, preserved.batch, preserved.micro)
                accelerator.backward(weight * difference.sum() * job.team.size / others)
            total[1] += difference.detach().sum() / others
    return total, sigmas, waited


def _sent(accelerator: Accelerator, learner: Learner, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Around a forward and backward pass: whether its gradients, and those before, are averaged over processes now."""
    return contextlib.nullcontext() if now else accelerator.no_sync(learner.wrapped)


def _stop(job: Job, book: Logbook, state: State, number: int, saved: bool) -> NoReturn:
    """End after a signal, with this step saved. A round of validation that it cut short is made up for on resume."""
    if saved:
        book.writer.wait()
    else:
        book.save(state, wait=True)
    job.say(f"stopped by {signal.Signals(number).name} after step {state.progress.step}, which is saved; "
            "continue with train.resume_from_checkpoint=latest")  # fmt: skip
    raise SystemExit(exit_code(number))


def _validate(job: Job, book: Logbook, validation: Validation | None, due: Due, cancelled: Callable[[], bool]) -> bool:
    """Measure and draw; processes that have no part in it wait. False where it was given up."""
    whole, alone = True, job.sharding is None  # processes that draw together are not cancelled one by one
    with explained(job.config, "drawing samples", shared=not alone):
        if validation is not None:
            checkpoint = book.written_checkpoint if due.saves else None
            whole = validation(book.progress.step, lambda: alone and cancelled(), due.draws, checkpoint)
        job.team.meet("drawing samples")
    return whole


def patience(config: Config) -> timedelta:
    """How long processes wait for one of them within a step, once the first step is done."""
    given = config.train.collective_timeout
    if given is None and (config.train.compile or not config.cache.use_cache):
        return processes.START_TIMEOUT  # a new size is compiled by the process that meets it, and encoders may be slow
    return timedelta(seconds=given or 20)


def agree(accelerator: Accelerator, losses: Tensor, signal_number: int) -> tuple[list[float], int]:
    """Sums of some losses (N,) over all processes, and the signal that any of them received (0 for none)."""
    if accelerator.num_processes == 1:
        return losses.tolist(), signal_number
    shared = torch.cat([losses.float(), torch.tensor([float(signal_number)], device=losses.device)])
    gathered = accelerator.gather(shared[None])
    return gathered[:, :-1].sum(dim=0).tolist(), int(gathered[:, -1].max())
