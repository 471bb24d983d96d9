"""SIGTERM, SIGUSR1 (preemption), SIGHUP (a terminal that closes) and SIGINT: a run that trains is saved first; all
else ends at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # exit codes: after SIGINT, after SIGTERM, SIGUSR1 and SIGHUP


class StopSignals:
    """Handlers of these signals, from construction to `restore`; in the main thread only.

    SIGHUP stays ignored where the process was started to ignore it, as nohup does.

    Before `defer` a signal raises SystemExit wherever the process is: whatever it writes is whole or not there. After
    it a signal is only noted in `received`, and the loop saves. A second SIGINT ends the process at once, also while
    a checkpoint is being written: what is half-written has a hidden name, and the next start removes it.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0  # the first signal
        self._deferred = False
        self._process = os.getpid()
        heard = [number for number in self.NUMBERS if not _under_nohup(number)]
        self._previous = {number: signal.signal(number, self._handle) for number in heard}

    def defer(self) -> None:
        """From here on there is something to save: signals are noted.

        Raises:
            SystemExit: one came before, and its exception was lost on the way (in a destructor, for example).
        """
        self.check()
        self._deferred = True

    def check(self) -> None:
        """Raises SystemExit where a signal was received."""
        if self.received:
            raise SystemExit(exit_code(self.received))

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *problem: object) -> None:
        self.restore()
        if not self._deferred:
            self.check()  # native code may have swallowed the exception, or turned it into an error of its own

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker: it ends with its trainer, and not before
            return
        if self.received and number == signal.SIGINT:
            _tell("second SIGINT: stopped at once; continue from the last checkpoint")
            os._exit(INTERRUPTED)  # exceptions would wait for the thread that writes a checkpoint
        if self.received:
            return
        self.received = number
        name = signal.Signals(number).name
        if not self._deferred:
            _tell(f"{name}: stopped; training had not begun, and what was cached is kept")
            raise SystemExit(exit_code(number))
        _tell(f"{name}: saving after this step; a second SIGINT stops at once and keeps the last checkpoint")


def exit_code(number: int) -> int:
    """With which a process ends that this signal stopped."""
    return INTERRUPTED if number == signal.SIGINT else TERMINATED


def _under_nohup(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _tell(message: str) -> None:
    """Print from a handler: `print` may be the very thing that the signal interrupted, and cannot be entered twice.

    Not where nobody is left to read, as after SIGHUP.
    """
    with suppress(OSError):
        os.write(2, f"\n{message}\n".encode())
