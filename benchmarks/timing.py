"""Timing of variants side by side: interleaved, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

# What the ceilings are measured with, by the kind of device: large enough for the best that it can do.
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
PRODUCT_ROWS = {"cuda": 8192, "cpu": 1024}
FILLER_BYTES = 1 << 29

Mark = Callable[[], None]
Run = Callable[[Mark], Any]


class Timing(NamedTuple):
    """Medians over the rounds: from the first mark to the last, then of each interval; and how the first one varied."""

    seconds: list[float]
    spread: float  # (slowest - fastest) / median

    @classmethod
    def of(cls, rounds: list[list[float]]) -> Timing:
        columns = list(zip(*rounds, strict=True))
        seconds = [statistics.median(column) for column in columns]
        return cls(seconds, (max(columns[0]) - min(columns[0])) / max(seconds[0], 1e-12))


class Clock:
    """Seconds between marks: by CUDA events where there is a GPU, else by the wall clock."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        if not torch.cuda.is_available():
            self.marks.append(time.perf_counter())
            return
        if not self.marks:
            _keep_device_busy()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """From the first mark to the last, then between each mark and the next."""
        spans = [(self.marks[0], self.marks[-1]), *zip(self.marks, self.marks[1:], strict=False)]
        if not torch.cuda.is_available():
            return [end - begin for begin, end in spans]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in spans]


@lru_cache(None)
def _filler() -> torch.Tensor:
    return torch.empty(FILLER_BYTES, dtype=torch.uint8, device="cuda")


def _keep_device_busy() -> None:
    """Half a millisecond of writes in front of the first event.

    The host uses it to enqueue what follows, so that an event does not wait for Python. It also leaves the L2 cache in
    the same state for all.
    """
    for value in range(4):
        _filler().fill_(value)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved_intervals(runs: Mapping[str, Run], repeats: int = 10, warmup: int = 3) -> dict[str, Timing | Exception]:
    """Times over `repeats` rounds in which every run runs once; a run calls `mark` as it goes.

    A run that raises leaves the rounds, and its exception stands in the place of its times.
    """
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}
    failed: dict[str, Exception] = {}
    for round_number in range(warmup + repeats):
        for name, run in runs.items():
            if name in failed:
                continue
            clock = Clock()
            try:
                synchronize()
                run(clock.mark)
                seconds = clock.seconds()
            except Exception as error:  # whatever it is: the others' times are wanted all the same
                failed[name] = error.with_traceback(None)  # whose frames would hold on to tensors
                continue
            if round_number >= warmup:
                samples[name].append(seconds)
    return {name: failed[name] if name in failed else Timing.of(rounds) for name, rounds in samples.items()}


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int = 10, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each variant over `repeats` rounds in which every variant runs once."""

    def marked(run: Callable[[], Any]) -> Run:
        def timed(mark: Mark) -> None:
            mark()
            run()
            mark()

        return timed

    times = interleaved_intervals({name: marked(run) for name, run in variants.items()}, repeats, warmup)
    seconds = {}
    for name, timing in times.items():
        if isinstance(timing, Exception):
            raise timing
        seconds[name] = timing.seconds[0]
    return seconds


def peak_extra_bytes(run: Callable[[], Any]) -> int | None:
    """Memory that `run` takes at its peak beyond what is there before, its results included.

    On a GPU: allocated tensors. On a CPU: resident memory of the process, where Linux tells it; else None.
    """
    if not torch.cuda.is_available():
        return _peak_extra_resident_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del out
    return peak


def _peak_extra_resident_bytes(run: Callable[[], Any]) -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
        before = _resident_bytes("VmRSS")
    except (OSError, StopIteration):  # not Linux, or not allowed
        return None
    out = run()
    peak = _resident_bytes("VmHWM") - before
    del out
    return max(0, peak)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written a second by a large device copy: the ceiling of anything bound by memory."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / interleaved({"copy": lambda: target.copy_(source)})["copy"]


def product_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product: the ceiling of anything bound by arithmetic.

    By the same clock as the variants, so that a share of it is no artefact; `fastdpo.device` has a quicker estimate.
    """
    size = PRODUCT_ROWS[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / interleaved({"product": lambda: torch.mm(a, a, out=out)})["product"]
