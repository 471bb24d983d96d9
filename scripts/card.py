"""A card for a quarter of an hour: what is most worth knowing about it, measured in that order.

    python scripts/card.py --minutes 12     # goes on where the last call ended
    python scripts/card.py --tiny           # all of it on tiny models, on any machine, to see that it runs
    python scripts/card.py --pack           # the packages that a card without a network lacks, as wheels
    python scripts/card.py --predict        # what is expected of every row, without a card

Rows are those of `qif bench`, built and stepped by its functions. Each is written to a JSON file once it is known, so
being cut off loses one. Each has its share of the time. A row that needs more, or is cut off, is tried once more by a
later call, after all others and with twice its share; the file says why a row has no figure. What is in docs/card.json
already is not measured again; the section of docs/performance.md is written from that file. Nothing is fetched from a
network, but by --pack.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import card_page
import card_tests
import psutil
import torch
from card_rows import ROWS, TESTS, Row
from card_worker import Worker

from qwen_image_finetune.config import ConfigError
from qwen_image_finetune.disk.files import write_atomic

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "docs" / "card.json"
TRIES = 2
NOT_BEGUN = "not begun"


class Measuring(Protocol):
    """Who measures a row; as `card_worker.Worker`."""

    def start(self, seconds: float) -> None: ...
    def ask(self, question: Any, seconds: float) -> Any: ...
    def end(self) -> None: ...


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
        for row in rows:
            self._note(row, share_seconds=row.seconds(tiny)[1])
            if "found" not in self.of(row) and "missing" not in self.of(row):
                self._note(row, missing={"why": NOT_BEGUN, "tries": 0})

    def due(self) -> list[Row]:
        """What is to be measured: what was never tried, in order; then what ran out of its time or was cut off once."""
        tries = {row: self.of(row)["missing"]["tries"] for row in self.rows if "found" not in self.of(row)}
        return sorted((row for row in tries if tries[row] < TRIES), key=lambda row: tries[row])

    def measure(
        self,
        deadline: float,
        measuring: Measuring,
        tested: Callable[[float], dict[str, Any]],
        say: Callable[[str], None] = print,
    ) -> None:
        """Measure what is due and can end in time, in order.

        Args:
            deadline: of `time.monotonic`.
            measuring: answers a row with what the file shall say of it.
            tested: answers for the tests, within so many seconds.
        """
        for row in self.due():
            tries = self.of(row)["missing"]["tries"]
            seconds, share = row.seconds(self.tiny)
            try:
                if row.family != TESTS and seconds < deadline - time.monotonic():
                    measuring.start(deadline - time.monotonic())  # which is no row's time
            except (TimeoutError, ChildProcessError) as error:
                self._miss(row, f"{NOT_BEGUN}: what measures did not start: {str(error) or 'the time was up'}", tries)
                say(f"{row.name}: {self.of(row)['missing']['why']}")
                break
            left = deadline - time.monotonic()
            if seconds > left:
                left_over = max(0.0, left)
                self._miss(row, f"{NOT_BEGUN}: {seconds} s were expected and {left_over:.0f} were left", tries)
                continue
            self._miss(row, f"cut off with the call, on try {tries + 1}", tries + 1)  # until it is known
            limit, began = min(share * (tries + 1.0), left), time.monotonic()
            try:
                news = self._tested(tested, limit) if row.family == TESTS else measuring.ask(row, limit)
            except (TimeoutError, ChildProcessError) as error:
                why = f"not ended after {limit:.0f} s, on try {tries + 1}" if isinstance(error, TimeoutError) else ""
                why = f"{why}{'; ' * bool(why and str(error))}{error}"
                self._miss(row, why, tries + 1)
                say(f"{row.name}: {why}")
                continue
            if "broken" in news:
                measuring.end()
                del news["broken"]
            news["found"]["seconds"] = round(time.monotonic() - began, 1)
            self.written |= {"device": self.device, "torch": torch.__version__}
            del self.written["rows"][row.name]["missing"]
            self._note(row, **news)
            self._write()
            say(f"{row.name}: {self._in_words(row)}")
        self._write()
        say(self.ended())

    def ended(self) -> str:
        """How far it is."""
        missing = [row for row in self.rows if "found" not in self.of(row)]
        due = self.due()
        words = f"{len(self.rows) - len(missing)} of {len(self.rows)} rows are known"
        words += f"; given up after {TRIES} tries: {len(missing) - len(due)}" * (len(missing) > len(due))
        return words + (f"; next: {due[0].name}" if due else "")

    def predict(self, predicted: Callable[[Row], dict[str, Any]], card: str) -> None:
        """Write what is expected of the rows, where it is not known for this card."""
        for row in self.rows:
            if row.family != TESTS and self.of(row).get("predicted", {}).get("card") != card:
                self._note(row, predicted=predicted(row))
                self._write()
        self._write()

    def of(self, row: Row) -> dict[str, Any]:
        """What the file says of a row."""
        return dict(self.written["rows"].get(row.name, {}))

    def _tested(self, tested: Callable[[float], dict[str, Any]], limit: float) -> dict[str, Any]:
        return {"found": dict(card_tests.NO_CARD) if self.device == "CPU" else tested(limit)}

    def _miss(self, row: Row, why: str, tries: int) -> None:
        self._note(row, missing={"why": why, "tries": tries})
        self._write()

    def _note(self, row: Row, **news: Any) -> None:
        self.written["rows"][row.name] = self.of(row) | news

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, json.dumps(self.written, indent=1) + "\n")

    def _in_words(self, row: Row) -> str:
        found, expected = self.of(row)["found"], self.of(row).get("predicted", {})
        if "milliseconds" not in found:
            return ", ".join(f"{value} {key}" for key, value in found.items() if key not in ("failures", "seconds"))
        peak = "" if found["peak_bytes"] is None else f", peak {found['peak_bytes'] / card_page.GIB:.2f} GiB"
        beside = f"{expected['milliseconds']:.0f} ms and {expected['peak_bytes'] / card_page.GIB:.2f} GiB were expected"
        return f"{found['milliseconds']:.1f} ms, first {found['first_step_seconds']:.1f} s{peak}; {beside}"


def _measurer(card: str, tiny: bool) -> Any:
    from card_measure import Measurer  # and with it all that is stepped, which the worker alone needs

    return Measurer(card, tiny)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="after which no row is begun, and none goes on")
    parser.add_argument("--output", type=Path, help="JSON file; default: docs/card.json, with --tiny build/card.json")
    parser.add_argument("--tiny", action="store_true", help="tiny models, which need no card")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pack", type=Path, nargs="?", const=ROOT / "build" / "wheels", metavar="FOLDER",
                      help="download the wheels that a card without a network lacks, as far as they fit")  # fmt: skip
    parser.add_argument("--limit", type=float, default=60, metavar="MIB", help="of what is packed")
    what.add_argument("--predict", action="store_true", help="only write what is expected")
    what.add_argument("--page", action="store_true", help="only write the section of docs/performance.md")
    options = parser.parse_args(arguments)
    began = psutil.Process().create_time()  # imports take their part
    deadline = time.monotonic() - (time.time() - began) + 60 * options.minutes
    if options.pack:
        import card_wheels

        card_wheels.pack(options.pack, options.limit)
        return
    file = options.output or (ROOT / "build" / "card.json" if options.tiny else KNOWN)
    try:
        study = Study(file, options.tiny)
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    if not options.page:
        if options.predict:
            measurer = _measurer(study.device, options.tiny)
            study.predict(measurer.predict, measurer.named.name)
        elif not (options.tiny or torch.cuda.is_available()):
            raise SystemExit("no card here: --tiny shows that everything runs, --predict what to expect of one")
        else:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # no process stays behind
            with Worker(_measurer, study.device, options.tiny) as worker:
                study.measure(deadline, worker, card_tests.tested)
    section = card_page.section(study.written, ROWS)
    if file == KNOWN:
        card_page.write(section)
    else:
        print(section)


if __name__ == "__main__":
    main()
