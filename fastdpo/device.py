"""What the device at hand can do, measured; its memory, used and kept. A leaf."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_GEMM_SECONDS = 0.5  # no product begins later than this
_GEMM_PATIENCE = 10  # products in a row that are no faster than the best by a hundredth


@functools.cache
def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What this device reaches in a large square matrix product: the ceiling that MFU is a fraction of.

    That of the fastest product, since whatever else the machine does can only slow one down: they are repeated until
    ten in a row bring nothing, half a second at most. Measured once a process; draws nothing from the run's generators.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    out = torch.empty_like(a)  # fresh memory is faulted in page by page
    best, idle = float("inf"), 0
    end = time.perf_counter() + _GEMM_SECONDS
    while idle < _GEMM_PATIENCE and (best == float("inf") or time.perf_counter() < end):
        seconds = _product_seconds(a, out)
        idle = 0 if seconds < 0.99 * best else idle + 1
        best = min(best, seconds)
    return 2 * size**3 / best


def _product_seconds(a: Tensor, out: Tensor) -> float:
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    start = time.perf_counter()
    torch.mm(a, a, out=out)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB (1e9 bytes): allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux KiB


# Options of glibc's mallopt, from its malloc.h, and the largest values that glibc itself would settle on.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST_TRIM, _LARGEST_MMAP = -1, 64 << 20, 32 << 20
_keepers = 0


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Within it, memory that PyTorch frees on a CPU stays with the process; on leaving, it goes back to the system.

    glibc returns freed memory to the system at once, and every training step then faults it in again, page by page: of
    a step of SmolLM2-135M on two cores, 0.1 of the time (1.19 -> 1.05 s a pair, means of two runs, with a peak memory
    that stays the same). GPUs have PyTorch's own caching allocator; elsewhere than with glibc this does nothing.
    """
    global _keepers
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    _keepers += 1
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP)
    try:
        yield
    finally:
        _keepers -= 1
        if not _keepers:
            libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM)
            libc.malloc_trim(0)


@lru_cache(None)
def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
