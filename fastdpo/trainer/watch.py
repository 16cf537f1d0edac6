"""What a run of days must survive: numbers that are no numbers, and being told to stop."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class NotFiniteError(FloatingPointError):
    """The loss or its gradient is no finite number; the message names step and rows."""


@dataclass
class StepWatch:
    """Losses and gradient norms of the steps since they were last looked at, on the device, with the rows of each.

    Nothing waits until `first_bad`, which is called where the run waits anyway.
    """

    steps: list[tuple[int, Tensor, Any, tuple[Any, ...]]] = field(default_factory=list)

    def add(self, step: int, loss: Tensor, grad_norm: Any, rows: tuple[Any, ...]) -> None:
        self.steps.append((step, loss, grad_norm, rows))

    def first_bad(self) -> tuple[int, float, float, tuple[Any, ...]] | None:
        """(step, loss, gradient norm, rows) of the first that is not finite; forgets all."""
        steps, self.steps = self.steps, []
        if not steps:
            return None
        device = steps[0][1].device
        norms = [torch.as_tensor(0.0 if norm is None else norm, device=device).float() for _, _, norm, _ in steps]
        losses = [loss.float() for _, loss, _, _ in steps]
        values = torch.stack([torch.stack(losses), torch.stack(norms)], dim=1)
        for (step, _, _, rows), (loss, norm) in zip(steps, values.tolist(), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                return step, loss, norm, rows
        return None


@dataclass
class StepParts:
    """What the passes of an optimizer step have given so far."""

    losses: list[Tensor] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    grad_norm: Any = None

    def add(self, loss: Tensor, passes: Sequence[Any]) -> None:
        self.losses.append(loss)
        self.rows += [row for part in passes if part.get("weight", 1.0) for row in part.get("rows", ())]

    def take(self) -> tuple[Tensor, Any, tuple[Any, ...]]:
        """(loss, gradient norm, rows), and forgets them."""
        loss, norm, rows = torch.stack(self.losses).sum(), self.grad_norm, tuple(self.rows)
        self.losses, self.rows, self.grad_norm = [], [], None
        return loss, norm, rows


def write_aside(path: Path, step: int, rows: Sequence[Any], dataset: Any, process: int) -> None:
    """Appends the rows (numbers as in the data set given, tokens as trained) of a step to a .jsonl file."""
    numbers = set(rows)
    with path.open("a") as file:
        if dataset is None or not hasattr(dataset, "select"):
            file.write(json.dumps({"step": step, "process": process, "rows": sorted(numbers)}) + "\n")
            return
        places = [place for place, number in enumerate(dataset["row_number"]) if number in numbers]
        for row in dataset.select(places):
            file.write(json.dumps({"step": step, "process": process, **row}, default=str) + "\n")


class StopRequest:
    """Ctrl-C and SIGTERM, taken as a wish: the run saves a checkpoint at the end of the step, then stops.

    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread may; elsewhere (notebooks' workers, say) signals stay what they are."""
        self.signal = None  # what an earlier run was told
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._asked)
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # one that C installed
                    signal.signal(number, handler)

    def _asked(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("%s: saving a checkpoint at the end of this step, then stopping.", signal.Signals(number).name)

    def finish(self, number: int) -> None:
        """After the checkpoint: what the signal (0 for none) would have done."""
        self.signal = None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
