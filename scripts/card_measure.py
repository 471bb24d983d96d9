"""The measurements of scripts/card.py: a row on the bench, and what is expected of it."""

from __future__ import annotations

from typing import Any

import torch
from card_rows import BASELINE, EAGER, PLANNED, Row

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.fitting import bench, choice, plan, speed
from qwen_image_finetune.fitting.estimate import GIB, Estimator

GOAL = "H100"  # whose rows are predicted where there is no card
STEPS = 4  # timed ones of a row
AUTO = {"model.quantize": "auto", "train.compile": "auto", "train.memory": "auto"}


class Measurer:
    """Rows as `qif bench` builds and steps them; in a process that may fail in any way."""

    def __init__(self, card: str, tiny: bool) -> None:
        """
        Args:
            card: what the driver calls it; of one that is not in `speed.CARDS` nothing is expected but the goal's.
        """
        named = speed.card_called(card) or speed.card_called(GOAL)
        assert named is not None
        self.named, self.tiny = named, tiny
        self.subjects: dict[tuple[str, int, int], bench.Subject] = {}

    def __call__(self, row: Row) -> dict[str, dict[str, Any]]:
        """What was expected of a row, and what was found, by `qif bench`; `broken` where nothing can follow here."""
        expected = self.predict(row)
        if "error" in expected:
            return {"predicted": expected, "found": {"error": expected["error"]}}
        what, options = self._subject(row), self._options(row)
        variant = None if row.variant == BASELINE else bench.VARIANTS.get(row.variant)
        if row.variant == PLANNED:
            config = self._estimator(row)[0].config
            card = None if row.cap is None else GIB * row.cap
            variant = bench.Variant({}, config.model.quantize, card, config)
        eager = self.tiny and not torch.cuda.is_available()
        if eager:  # minutes a row
            torch.compiler.set_stance("force_eager")
            bench.WARM_UP = 0
        torch.use_deterministic_algorithms(row.deterministic, warn_only=True)
        try:
            visit = bench.visit(row.name, variant, options, what.family, what.about, what.batch)
        finally:
            torch.use_deterministic_algorithms(False)
        found = bench.merged([visit], what.found, options)
        if eager and row.variant not in EAGER:
            found["not_compiled"] = "no card: stepped as it is, for compiling takes minutes on a CPU"
        return {"predicted": expected, "found": found, **({} if "error" not in found or alive() else {"broken": {}})}

    def predict(self, row: Row) -> dict[str, Any]:
        """What is expected of a row: milliseconds, bytes, the settings where they are the planner's."""
        try:
            return {**self._predicted(row), "card": self.named.name}
        except ConfigError as error:
            return {"error": str(error).splitlines()[0], "card": self.named.name}

    def _predicted(self, row: Row) -> dict[str, Any]:
        estimator, why = self._estimator(row)
        estimate = estimator.estimate()
        train, attained = estimator.config.train, self.named.attained
        attends = "flash"
        if attained is not None and row.variant != BASELINE:
            attends = min(attained.attention, key=lambda name: -sum(attained.attention[name]))
        step = speed.Step(train.recomputation_keeps, train.compile is True, estimator.format, attends)
        fetches = any(estimate.host.get(part) for part in ("swapped blocks", "activations"))
        seconds = None if fetches else speed.seconds(estimator.footprint, step, self.named)
        guess = seconds is None
        if seconds is None:
            seconds = choice.supposed(estimator, estimate, self.named, attends)
        found: dict[str, Any] = {"milliseconds": 1e3 * seconds, "guess": guess, "peak_bytes": estimate.peak}
        return found if why is None else {**found, "why": why}

    def _estimator(self, row: Row) -> tuple[Estimator, str | None]:
        """Of the row's settings, and what the planner says of those that are its own."""
        what, options = self._subject(row), self._options(row)

        def of(config: Any) -> Estimator:
            made = Estimator(what.family, config, None, what.sizes)
            made._footprint = lambda sizes: what.found  # type: ignore[method-assign]  # counted already
            return made

        if row.variant != PLANNED:
            variant = bench.VARIANTS.get(row.variant, bench.Variant(bench.RECOMPUTED))
            return of(bench.config_of(options, variant)), None
        memory = GIB * (row.cap or self.named.memory)
        asking = of(plan.with_keys(bench.config_of(options, bench.Variant()), AUTO))
        config, why = choice.decided(asking, memory, self.named, here=False)
        config, sentence = plan.decided(of(config), memory)
        return of(config), f"{why}; {sentence}"

    def _subject(self, row: Row) -> bench.Subject:
        key = (row.family, row.side, row.batch)
        if key not in self.subjects:
            self.subjects[key] = bench.subject(self._options(row))
        return self.subjects[key]

    def _options(self, row: Row) -> bench.Options:
        steps = 1 if self.tiny and not torch.cuda.is_available() else STEPS
        return bench.Options(row.family, size=(row.side, row.side), batch=row.batch, steps=steps, tiny=self.tiny)


def alive() -> bool:
    """Whether the card still answers this process: after an illegal access it never does again."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True
