"""Workers of data loaders, which signals of the run do not reach."""

from __future__ import annotations

import atexit
import os
import signal
from typing import Any

import torch

# Shared with all workers: 1 when the program ends.
_ended = torch.zeros(1, dtype=torch.uint8).share_memory_()


@atexit.register
def _end() -> None:
    """Before multiprocessing's own exit, which sends SIGTERM to the workers that are left and waits for them."""
    _ended.fill_(1)


class PatientWorker:
    """What begins a worker that leaves signals to the run: it stops when the run is done with it, or has ended.

    Ctrl-C and SIGTERM mostly reach a whole process group, and the run still needs its batches to finish the step.
    """

    def __init__(self, begin: Any) -> None:
        self.begin, self.ended = begin, _ended

    def __call__(self, number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._asked)
        if self.begin is not None:
            self.begin(number)

    def _asked(self, number: int, frame: Any) -> None:
        if self.ended.item():
            os._exit(128 + number)
