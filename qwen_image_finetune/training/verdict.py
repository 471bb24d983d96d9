"""What held-out losses and samples say about a run, in words and in the file that points to the best checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen_image_finetune.disk import history, runs
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.judging.intervals import Interval, t_interval

if TYPE_CHECKING:
    from PIL.Image import Image

JUMP = 1.5  # a held-out loss that is so many times another one's is a jump, if the pairs agree
CONSTANT, VARIED = 4.0, 16.0  # standard deviations of a picture's values (0 to 255): of one colour, and clearly not


@dataclass(frozen=True)
class Measured:
    """Losses of the same held-out pairs after some step."""

    step: int
    losses: list[float]

    @property
    def mean(self) -> float:
        """Over the pairs."""
        return math.fsum(self.losses) / len(self.losses)

    def against(self, other: Measured) -> Interval:
        """Mean difference of the pairs; negative is better than `other`."""
        return t_interval([ours - theirs for ours, theirs in zip(self.losses, other.losses, strict=True)])

    def values(self, base: Measured | None) -> dict[str, float]:
        """Numbers for the curves."""
        values = {"held_out_loss": self.mean}
        if base is not None:
            mean, low, high = self.against(base)
            values |= {"held_out_difference": mean, "held_out_low": low, "held_out_high": high}
        return values


class Best:
    """best.json of a version: the saved step with the least held-out loss, which outlives the limit on checkpoints."""

    def __init__(self, run: runs.Run) -> None:
        self.run = run
        self.measured: Measured | None = None
        kept = history.read_best(run.path)
        if kept is not None and kept.get("losses") and (run.path / kept["checkpoint"]).is_dir():
            self.measured = Measured(int(kept["step"]), [float(loss) for loss in kept["losses"]])

    def offer(self, now: Measured, base: Measured | None, checkpoint: Path | None) -> None:
        """Point to a checkpoint if it is better than the one before, not if it is not saved or its loss not finite.

        Measured with other pairs, an old best says nothing about the new ones and is replaced.
        """
        if checkpoint is None or not math.isfinite(now.mean):
            return
        comparable = self.measured is not None and len(self.measured.losses) == len(now.losses)
        if comparable and self.measured is not None and self.measured.mean <= now.mean:
            return
        self.measured = now
        about = {"step": now.step, "checkpoint": checkpoint.name, **now.values(base), "losses": now.losses}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in about.items()
        }
        write_atomic(self.run.path / history.BEST, json.dumps(finite) + "\n")


def verdict(now: Measured, base: Measured | None, last: Measured | None, best: Measured | None) -> Iterator[str]:
    """The held-out loss in a sentence, and what is wrong with it, if anything is.

    Args:
        last: the round before.
        best: the best saved one.
    """
    pairs = f"{len(now.losses)} held-out pair{'s' * (len(now.losses) > 1)}"
    words = f"step {now.step}: loss {now.mean:.4f} on {pairs}"
    if base is not None:
        words += f", {_difference(now.against(base))} from the base's {base.mean:.4f}"
    yield words
    if not math.isfinite(now.mean):
        yield f"warning: the held-out loss of step {now.step} is not finite: the run has collapsed"
        return
    for other, name in ((base, "the base's"), (last, "that of the round before")):
        if other is not None and now.mean > JUMP * other.mean and now.against(other).low > 0:
            yield (
                f"warning: the held-out loss of step {now.step} is {now.mean / other.mean:.1f} times {name}: "
                "the run may have collapsed; lower optimizer.init_args.lr"
            )
            return
    if best is not None and len(best.losses) == len(now.losses) and now.against(best).low > 0:
        yield (
            f"warning: the held-out loss of step {now.step} is above that of step {best.step} by "
            f"{_difference(now.against(best))}: what is learnt since does not hold for other pictures; "
            f"the checkpoint of step {best.step} is the better one so far"
        )


def beside(now: Measured, averaged: Measured) -> str:
    """The held-out loss of the average of the weights, beside that of the weights."""
    return f"step {now.step}: loss {averaged.mean:.4f} of the average, {_difference(averaged.against(now))} from theirs"


def constant(step: int, drawn: Sequence[Image], truths: Sequence[Image]) -> str | None:
    """A warning where samples are of nearly one colour although their truths are not."""
    flat = [
        place
        for place, (picture, truth) in enumerate(zip(drawn, truths, strict=True))
        if _spread(picture) < CONSTANT and _spread(truth) > VARIED
    ]
    if not flat:
        return None
    return (
        f"warning: {len(flat)} of {len(drawn)} samples of step {step} are nearly of one colour, which their truths are "
        "not: the model may have collapsed"
    )


def _spread(picture: Image) -> float:
    """Standard deviation of a picture's values around the mean of their channel, 0 to 127.5."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    return float(np.sqrt(pixels.var(axis=(0, 1)).mean()))


def _difference(interval: Interval) -> str:
    return interval.words if math.isfinite(interval.low) else f"{interval.mean:+.4f} (one pair has no interval)"
