"""A process that answers, and can be ended: what hangs in the driver or in a compiler listens to nothing else."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """Calls a function in another process, which is started when it is needed, and anew after it was ended."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        """
        Args:
            make: called there with `arguments`, once; returns the function.
        """
        self.making = make, arguments
        self.process: Any = None
        self.answers: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def start(self, seconds: float) -> None:
        """Have it ready, which takes the time of its imports.

        Raises:
            TimeoutError: it is not, after so many seconds.
            ChildProcessError: it ended.
        """
        if self.process is None:
            spawning = multiprocessing.get_context("spawn")  # CUDA bears no fork
            self.answers, there = spawning.Pipe()
            self.process = spawning.Process(target=_serve, args=(there, *self.making), daemon=True)
            self.process.start()
            there.close()
            self._answer(seconds)

    def ask(self, question: Any, seconds: float) -> Any:
        """The function's answer; `start` is called before.

        Raises:
            TimeoutError: there is none after so many seconds; the process was ended.
            ChildProcessError: the process ended by itself.
        """
        began = time.monotonic()
        self.start(seconds)
        try:
            self.answers.send(question)
        except OSError:
            raise self._ended() from None
        return self._answer(seconds - (time.monotonic() - began))

    def end(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.answers.close()
            self.process = None

    def _answer(self, seconds: float) -> Any:
        try:
            if self.answers.poll(max(0.0, seconds)):
                return self.answers.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        self.end()
        raise TimeoutError

    def _ended(self) -> ChildProcessError:
        self.process.join()
        code = self.process.exitcode
        self.end()
        return ChildProcessError(f"its process ended with exit code {code}")


def _serve(answers: Connection, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    function = make(*arguments)
    answers.send(None)
    while True:
        try:
            question = answers.recv()
        except EOFError:  # who asks is gone
            return
        answer = function(question)
        try:
            answers.send(answer)
        except BrokenPipeError:  # gone meanwhile
            return
