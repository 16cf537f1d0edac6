"""Ctrl-C and SIGTERM while a command runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The command was told to stop; the message says what is there, and how to go on.

    code: the exit code, 128 and the signal's number
    """

    def __init__(self, message: str = "interrupted", code: int = 128 + signal.SIGINT) -> None:
        super().__init__(message)
        self.code = code


class Signals:
    """What SIGINT and SIGTERM do: they raise Interrupted, but while they are held they wait."""

    def __init__(self) -> None:
        self._held, self._waiting = False, 0

    @contextmanager
    def listening(self) -> Iterator[Signals]:
        """Only the main thread may; elsewhere signals stay what they are."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._told)
        try:
            yield self
        finally:
            for number, handler in before.items():
                if handler is not None:  # one that C installed
                    signal.signal(number, handler)

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        """Raises Interrupted for a signal that came meanwhile."""
        self._held = False
        if self._waiting:
            number, self._waiting = self._waiting, 0
            raise Interrupted(code=128 + number)

    def _told(self, number: int, frame: Any) -> None:
        if self._held:
            self._waiting = number
        else:
            raise Interrupted(code=128 + number)
