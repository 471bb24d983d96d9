"""Trains, and in the first attempt something happens to the last process when it reads the samples of step 4.

torchrun ... faulty.py CONFIG killed|hung|stopped|none [section.key=value ...]
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from qwen_image_finetune.config import load_config
from qwen_image_finetune.machine.processes import Team
from qwen_image_finetune.training.train import train


def main() -> None:
    config, fault = Path(sys.argv[1]), sys.argv[2]
    enter = Team.enter

    def faulty(team: Team, place: str) -> None:
        enter(team, place)
        if place != "reading the samples of step 4" or team.rank != team.size - 1:
            return
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if fault == "hung":
                threading.Event().wait()
            elif fault != "none":
                print(f"process {team.rank} is {fault}", flush=True)
                os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[fault])

    Team.enter = faulty  # type: ignore[method-assign]
    train(load_config(config, sys.argv[3:]))


if __name__ == "__main__":
    main()
