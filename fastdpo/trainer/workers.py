"""Workers of data loaders, which signals of the run do not reach."""

from __future__ import annotations

import functools
import os
import signal
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _ended(process: int) -> Tensor:
    """What a process shares with the workers that it begins: 1 when it comes to its end.

    That is before multiprocessing sends SIGTERM to the workers that are left and waits for them.
    """
    ended = torch.zeros(1, dtype=torch.uint8).share_memory_()
    Finalize(None, ended.fill_, args=(1,), exitpriority=100)
    return ended


class PatientWorker:
    """What begins a worker that leaves signals to the run: it stops when the run is done with it, or has ended.

    Ctrl-C and SIGTERM mostly reach a whole process group, and the run still needs its batches to finish the step.
    """

    def __init__(self, begin: Any) -> None:
        self.begin, self.ended = begin, _ended(os.getpid())

    def __call__(self, number: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._asked)
        if self.begin is not None:
            self.begin(number)

    def _asked(self, number: int, frame: Any) -> None:
        if self.ended.item():
            os._exit(0)  # anything else is an error to the process that waits for it
