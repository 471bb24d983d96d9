"""Put every fault of docs/reliability.md into whole runs, as often as that page says, and print one line for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Run the tests in tests/faults at full counts; arguments go to pytest, for example -k killed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        report.touch()
        environment = {**os.environ, "QIF_FAULTS": "full", "QIF_FAULTS_REPORT": str(report)}
        command = [sys.executable, "-m", "pytest", "tests/faults", *sys.argv[1:]]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        lines = [json.loads(line) for line in report.read_text().splitlines()]
    width = max((len(line["row"]) for line in lines), default=0)
    print(f"{'fault':{width}}  tried  survived  lost")
    for line in lines:
        print(f"{line['row']:{width}}  {line['tried']:5}  {line['survived']:8}  {line['lost']:4}  {line['note']}")
    return code


if __name__ == "__main__":
    sys.exit(main())
