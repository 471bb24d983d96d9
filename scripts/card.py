"""A card for a quarter of an hour: what is most worth knowing about it, measured in that order.

    python scripts/card.py --minutes 12     # goes on where the last call ended
    python scripts/card.py --tiny           # all of it on tiny models, on any machine, to see that it runs
    python scripts/card.py --pack           # the packages that a card without a network lacks, as wheels
    python scripts/card.py --predict        # what is expected of every row, without a card

Rows are those of `qif bench`, built and stepped by its functions. Each is written to a JSON file once it is known, so
being cut off loses one. What is in docs/card.json already is not measured again; the section of docs/performance.md is
written from that file. Nothing is fetched from a network, but by --pack.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as tree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import card_page
import card_wheels
import torch

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.disk.files import write_atomic
from qwen_image_finetune.fitting import bench, choice, plan, speed
from qwen_image_finetune.fitting.estimate import GIB, Estimator

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "docs" / "card.json"
TESTS = "tests/gpu"
PLANNED = "auto"  # the settings are the planner's
GOAL = "H100"  # whose rows are predicted where there is no card
STEPS = 4  # timed ones of a row
AUTO = {"model.quantize": "auto", "train.compile": "auto", "train.memory": "auto"}
# Seconds that a row takes on a card, for whether to begin it: random weights, compiling, steps.
TESTING, EAGER, COMPILED = 150, 45, 90


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    family: str  # or TESTS
    variant: str = ""  # of `qif bench`, or PLANNED
    side: int = 1024  # of target and reference, in pixels
    batch: int = 1
    cap: int | None = None  # GiB that the card is taken to have
    deterministic: bool = False
    ratio: float | None = None  # to the baseline: the goal
    peak: float | None = None  # GiB, the goal

    @property
    def name(self) -> str:
        """What it is called in the file."""
        extra = [f"{self.side} pixels"] * (self.side != 1024) + [f"batch {self.batch}"] * (self.batch != 1)
        extra += [f"{self.cap} GiB"] * (self.cap is not None) + ["deterministic"] * self.deterministic
        return " ".join([self.family, self.variant, *extra]).strip()

    @property
    def beside(self) -> Row:
        """The baseline that it is compared with."""
        return Row(self.family, bench.BASELINE, self.side, self.batch)

    @property
    def seconds(self) -> int:
        """What to expect of it, to begin it or not."""
        if self.family == TESTS:
            return TESTING
        variant = bench.VARIANTS.get(self.variant)
        return COMPILED if self.variant == PLANNED or (variant and variant.train.get("compile")) else EAGER


KONTEXT, QWEN = "FluxKontext", "QwenImageEdit"
ROWS = (
    Row(TESTS),
    Row(KONTEXT, bench.BASELINE),
    Row(KONTEXT, "fp8-kept", ratio=2.6, peak=19),
    Row(KONTEXT, "fp8-free", ratio=3.0, peak=50),
    Row(KONTEXT, "int8-kept", ratio=2.2, peak=19),
    Row(QWEN, bench.BASELINE),
    Row(QWEN, "fp8-kept", ratio=2.6, peak=28),
    Row(QWEN, "fp8-free", ratio=2.7, peak=70),
    Row(QWEN, "int8-kept"),
    *(Row(family, PLANNED, cap=cap, peak=cap) for cap in (24, 16, 12, 8) for family in (KONTEXT, QWEN)),
    Row(KONTEXT, "fp8", ratio=2.1, peak=17),
    Row(KONTEXT, "kept"),
    Row(KONTEXT, "nf4", ratio=1.6, peak=9),
    Row(KONTEXT, "fp8-offloaded"),
    Row(KONTEXT, "fp8-swapped"),
    *(Row(family, variant) for family in ("Flux2Klein", "QwenImage21")
      for variant in (bench.BASELINE, PLANNED, "free", "kept", "fp8-free", "fp8-kept")),
    *(Row(KONTEXT, variant, side=512) for variant in (bench.BASELINE, "fp8-free", "int8-free", "free")),
    *(Row(KONTEXT, variant, batch=4) for variant in (bench.BASELINE, "fp8-kept")),
    Row(KONTEXT, "fp8-kept", deterministic=True),
)  # fmt: skip


class Study:
    """The rows of one card and the file that they are written to."""

    def __init__(self, file: Path, tiny: bool, rows: Sequence[Row] = ROWS) -> None:
        """
        Raises:
            ConfigError: the file is of another card.
        """
        self.file, self.tiny, self.rows = file, tiny, rows
        known = next((each for each in (file, *([] if tiny else [KNOWN])) if each.is_file()), None)
        self.written: dict[str, Any] = {"device": None, "torch": None, "rows": {}}
        if known is not None:
            self.written = json.loads(known.read_text(encoding="utf-8"))
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        before = self.written["device"]
        if before is not None and before != self.device and (tiny or torch.cuda.is_available()):
            raise ConfigError(f"{known} was measured on {before}, and this is {self.device}: name another --output")
        named = speed.card_called(self.device) or speed.card_called(GOAL)
        assert named is not None
        self.named = named
        self.subjects: dict[tuple[str, int, int], bench.Subject] = {}

    def measure(self, deadline: float, say: Callable[[str], None] = print) -> bool:
        """Measure what is not known and can end in time, in order; False where the driver gave up on this process.

        Args:
            deadline: of `time.monotonic`.
        """
        for row in self.rows:
            left = deadline - time.monotonic()
            if "found" in self._of(row) or (row.seconds > left and not self.tiny) or left < 0:
                continue
            began = time.monotonic()
            found = _tested(left) if row.family == TESTS else self._stepped(row)
            found["seconds"] = round(time.monotonic() - began, 1)
            self.written |= {"device": self.device, "torch": torch.__version__}
            self._write(row, found=found)
            say(f"{row.name}: {self._in_words(row, found)}")
            if "error" in found and not _alive():
                return False
        missing = [row.name for row in self.rows if "found" not in self._of(row)]
        next_one = f"; next: {missing[0]}" if missing else ""
        say(f"{len(self.rows) - len(missing)} of {len(self.rows)} rows are known{next_one}")
        return True

    def predict(self, row: Row) -> dict[str, Any]:
        """What is expected of a row: milliseconds, bytes, the settings where they are the planner's."""
        known = self._of(row).get("predicted")
        if known is None or known["card"] != self.named.name:
            try:
                known = self._predicted(row)
            except ConfigError as error:
                known = {"error": str(error).splitlines()[0]}
            known["card"] = self.named.name
            self._write(row, predicted=known)
        return dict(known)

    def _predicted(self, row: Row) -> dict[str, Any]:
        estimator, why = self._estimator(row)
        estimate = estimator.estimate()
        train, attained = estimator.config.train, self.named.attained
        attends = "flash"
        if attained is not None and row.variant != bench.BASELINE:
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
            made.__dict__["footprint"] = what.found  # counted already
            return made

        if row.variant != PLANNED:
            variant = bench.VARIANTS.get(row.variant, bench.Variant(bench.RECOMPUTED))
            return of(bench.config_of(options, variant)), None
        memory = GIB * (row.cap or self.named.memory)
        asking = of(plan.with_keys(bench.config_of(options, bench.Variant()), AUTO))
        config, why = choice.decided(asking, memory, self.named, here=False)
        config, sentence = plan.decided(of(config), memory)
        return of(config), f"{why}; {sentence}"

    def _stepped(self, row: Row) -> dict[str, Any]:
        """A visit to the bench, with what was expected written down before."""
        expected, what, options = self.predict(row), self._subject(row), self._options(row)
        if "error" in expected:
            return {"error": expected["error"]}
        variant = None if row.variant == bench.BASELINE else bench.VARIANTS.get(row.variant)
        if row.variant == PLANNED:
            config = self._estimator(row)[0].config
            card = None if row.cap is None else GIB * row.cap
            variant = bench.Variant({}, config.model.quantize, card, config)
        torch.use_deterministic_algorithms(row.deterministic, warn_only=True)
        try:
            visit = bench.visit(row.name, variant, options, what.family, what.about, what.batch)
        finally:
            torch.use_deterministic_algorithms(False)
        return bench.merged([visit], what.found, options)

    def _subject(self, row: Row) -> bench.Subject:
        key = (row.family, row.side, row.batch)
        if key not in self.subjects:
            self.subjects[key] = bench.subject(self._options(row))
        return self.subjects[key]

    def _options(self, row: Row) -> bench.Options:
        return bench.Options(row.family, size=(row.side, row.side), batch=row.batch, steps=STEPS, tiny=self.tiny)

    def _of(self, row: Row) -> dict[str, Any]:
        return dict(self.written["rows"].get(row.name, {}))

    def _write(self, row: Row, **news: dict[str, Any]) -> None:
        self.written["rows"][row.name] = self._of(row) | news
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, json.dumps(self.written, indent=1) + "\n")

    def _in_words(self, row: Row, found: dict[str, Any]) -> str:
        if row.family == TESTS or "error" in found:
            return ", ".join(f"{value} {key}" for key, value in found.items() if key in ("passed", "failed", "error"))
        expected = self._of(row)["predicted"]
        beside = f"{expected['milliseconds']:.0f} ms and {expected['peak_bytes'] / GIB:.2f} GiB were expected"
        return f"{bench.in_short(found)}; {beside}"


def _tested(seconds: float) -> dict[str, Any]:
    """The tests that need a card, in a process of their own that may fail in any way."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", TESTS, "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}"]
        try:
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"the tests had not ended after {seconds:.0f} s"}
        if not report.is_file():
            return {"error": (ended.stdout + ended.stderr).strip()[-500:]}
        cases = list(tree.parse(report).iter("testcase"))
    outcomes = [{child.tag for child in case} for case in cases]
    bad = [case.get("name") for case, tags in zip(cases, outcomes, strict=True) if tags & {"failure", "error"}]
    skipped = sum("skipped" in tags for tags in outcomes)
    return {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": len(bad), "failures": bad}


def _alive() -> bool:
    """Whether the card still answers this process: after an illegal access it never does again."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=12, help="after which no row is begun, or any that takes longer"
    )
    parser.add_argument("--output", type=Path, help="JSON file; default: docs/card.json, with --tiny build/card.json")
    parser.add_argument("--tiny", action="store_true", help="tiny models, which need no card")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pack", type=Path, nargs="?", const=ROOT / "build" / "wheels", metavar="FOLDER",
                      help="download the wheels that a card without a network lacks")  # fmt: skip
    what.add_argument("--predict", action="store_true", help="only write what is expected")
    what.add_argument("--page", action="store_true", help="only write the section of docs/performance.md")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if options.pack:
        card_wheels.pack(options.pack)
        return
    file = options.output or (ROOT / "build" / "card.json" if options.tiny else KNOWN)
    try:
        study = Study(file, options.tiny)
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    if options.predict:
        for row in ROWS[1:]:
            study.predict(row)
    elif not options.page:
        if not (options.tiny or torch.cuda.is_available()):
            raise SystemExit("no card here: --tiny shows that everything runs, --predict what to expect of one")
        if not study.measure(began + 60 * options.minutes):
            left = options.minutes - (time.monotonic() - began) / 60
            again = [*sys.argv[1:], f"--minutes={left:.2f}"]  # the last one given counts
            os.execv(sys.executable, [sys.executable, __file__, *again])
    section = card_page.section(study.written, ROWS)
    if file == KNOWN:
        card_page.write(section)
    else:
        print(section)


if __name__ == "__main__":
    main()
