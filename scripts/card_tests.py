"""The tests that need a card, for scripts/card.py: in a process of their own that may fail in any way."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

from card_rows import TESTS

ROOT = Path(__file__).parents[1]
LAST_WORDS = 15  # seconds for pytest to write down what it found, once it is stopped
NO_CARD = {"not_run": "no card, and every one of them needs one"}


def tested(seconds: float) -> dict[str, Any]:
    """How many passed, were skipped and failed, and which.

    Raises:
        TimeoutError: they had not ended; it says what had been found until then.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", TESTS, "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            try:
                said, late = run.communicate(timeout=max(1.0, seconds - LAST_WORDS))[0], False
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGINT)  # at which pytest writes its report
                try:
                    said, late = run.communicate(timeout=LAST_WORDS)[0], True
                except subprocess.TimeoutExpired:
                    run.kill()
                    raise TimeoutError("nothing was found until then") from None
        if not report.is_file():
            if late:
                raise TimeoutError("nothing was found until then")
            return {"error": said.strip()[-500:]}
        cases = list(tree.parse(report).iter("testcase"))
        cases = cases[:-1] if late else cases  # the last was stopped, which the report takes for passed
    outcomes = [{child.tag for child in case} for case in cases]
    bad = [case.get("name") for case, tags in zip(cases, outcomes, strict=True) if tags & {"failure", "error"}]
    skipped = sum("skipped" in tags for tags in outcomes)
    passed = len(cases) - len(bad) - skipped
    if late:
        raise TimeoutError(f"until then {passed} passed, {len(bad)} failed {bad or ''}".strip())
    return {"passed": passed, "skipped": skipped, "failed": len(bad), "failures": bad}
