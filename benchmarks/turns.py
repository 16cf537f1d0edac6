"""Programs that take turns, so that what else the machine does falls on all of them: compared in pairs, step by step.

Each contestant is a process that lives to the end; one works, the others wait. A ratio is of two neighbouring turns;
what is reported of them is the median, and from where to where they spread.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import process_environment


class Spread(NamedTuple):
    """Of the ratios of several turns."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Spread:
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def told(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f} to {self.greatest:.{digits}f})"

    def __str__(self) -> str:
        return self.told(3)


class Contestant:
    """A Python program that works in turns: it has a `Turns`, made of the words behind `--turns`."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        self.name = name
        own = folder / name
        own.mkdir()
        self._result = own / "result.json"
        (theirs, self._go), (self._done, told) = os.pipe(), os.pipe()
        words = ["--turns", str(theirs), str(told), "--out", str(self._result)]
        self._process = subprocess.Popen(
            [sys.executable, *arguments, *words], env=process_environment(str(own)), pass_fds=(theirs, told)
        )
        os.close(theirs)
        os.close(told)

    def turn(self) -> bool:
        """Lets it work until it waits again; False where it has ended instead."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"g")
        return os.read(self._done, 1) == b"d"

    def result(self) -> Any:
        """What it has written, once it has ended."""
        if self._process.wait():
            raise RuntimeError(f"{self.name} ended with exit code {self._process.returncode}; see its output above.")
        return json.loads(self._result.read_text())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self._go, self._done):
            os.close(end)


class Turns:
    """Of a contestant, in its own process: `wait` returns when it is its turn."""

    def __init__(self, go: str, done: str) -> None:
        self._go, self._done = int(go), int(done)
        self._working = False

    def wait(self) -> None:
        if self._working:
            os.write(self._done, b"d")
        if os.read(self._go, 1) != b"g":
            raise SystemExit("the benchmark that this program belongs to has ended")
        self._working = True


@contextlib.contextmanager
def contestants(commands: dict[str, Sequence[str]]) -> Iterator[dict[str, Contestant]]:
    with tempfile.TemporaryDirectory() as folder:
        started: dict[str, Contestant] = {}
        try:
            for name, arguments in commands.items():
                started[name] = Contestant(name, arguments, Path(folder))
            yield started
        finally:
            for contestant in started.values():
                contestant.stop()


def take_turns(started: dict[str, Contestant]) -> dict[str, Any]:
    """Turn by turn, each round begun by another, until all have ended: the result of each."""
    left = list(started.values())
    while left:
        left = [each for each in left if each.turn()]
        left = left[1:] + left[:1]
    return {name: contestant.result() for name, contestant in started.items()}
