"""How the threads of a computation wait for each other. Set before torch loads; says nothing of how many there are."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Whoever set one of these has chosen.
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def sleep_while_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait sleep, where they would by default run in circles until the last one is done.

    On a core that something else wants, circles are what keeps the last one from getting done: a step of a small model
    on a busy machine took many times the processor time (scripts/bench_threads.py). The number of threads, and with
    it every bit of the result, stays what it was.
    """
    if not any(name in environment for name in CHOICES):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
