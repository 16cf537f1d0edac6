"""What the device at hand can do, measured; its memory, used and kept. A leaf."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Sizes of the products, largest first; a GPU's is the largest whose operands take an eighth of the free memory.
_GEMM_SIZES = {"cuda": (8192, 4096, 2048), "cpu": (1024,)}
# No product begins later than this, in seconds; and products in a row that are no faster than the best by a hundredth.
# A GPU that did nothing needs some tenths of a second to come to its full clock.
_GEMM_SECONDS = {"cuda": 0.5, "cpu": 0.1}
_GEMM_PATIENCE = {"cuda": 100, "cpu": 10}


@functools.cache
def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What this device reaches in a large square matrix product: the ceiling that MFU is a fraction of.

    That of the fastest product, since whatever else the machine does can only slow one down: they are repeated until
    many in a row bring nothing, half a second at most (on a CPU a tenth). Measured once a process; draws nothing from
    the run's generators, and leaves neither memory behind nor a trace in the peak of allocated memory.

    Raises:
        torch.OutOfMemoryError: a GPU on which not even small operands find room.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    sizes = _GEMM_SIZES[kind]
    size = sizes[0] if kind == "cpu" else _largest_fitting(sizes, free_memory(device) // 8, dtype)
    with no_trace_in_peak(device):
        return _best_product(device, dtype, size, (sizes[0] // size) ** 3, _GEMM_SECONDS[kind], _GEMM_PATIENCE[kind])


def _largest_fitting(sizes: Sequence[int], room: int, dtype: torch.dtype) -> int:
    """Of two operands and a result in `room` bytes, or the smallest."""
    return next((size for size in sizes if 2 * size**2 * dtype.itemsize <= room), sizes[-1])


def _best_product(
    device: torch.device, dtype: torch.dtype, size: int, products: int, limit: float, patience: int
) -> float:
    """FLOPs a second; `products` run between two looks at the clock, so that small ones take as long as a large one."""
    a = torch.randn(size, size, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    out = torch.empty_like(a)  # fresh memory is faulted in page by page
    best, idle = float("inf"), 0
    end = time.perf_counter() + limit
    while idle < patience and (best == float("inf") or time.perf_counter() < end):
        seconds = _product_seconds(a, out, products)
        idle = 0 if seconds < 0.99 * best else idle + 1
        best = min(best, seconds)
    return 2 * products * size**3 / best


def _product_seconds(a: Tensor, out: Tensor, products: int) -> float:
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    start = time.perf_counter()
    for _ in range(products):
        torch.mm(a, a, out=out)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def is_out_of_memory(error: BaseException) -> bool:
    """Also of a library's own error: cuBLAS, which finds no room for its handle, raises a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU can still hand out, those included that PyTorch has reserved and not handed out."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


@contextmanager
def no_trace_in_peak(device: torch.device) -> Iterator[None]:
    """What is allocated within it and freed again does not show in `torch.cuda.max_memory_allocated`.

    Nor is a peak from before it lost: where the peak was raised, it is reset, and the earlier one is made again by an
    allocation that nothing is written to.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.max_memory_allocated(device)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # which hold on to tensors
        raise
    finally:
        torch.cuda.empty_cache()
        if torch.cuda.max_memory_allocated(device) > before:
            torch.cuda.reset_peak_memory_stats(device)
            missing = before - torch.cuda.memory_allocated(device)
            if missing > 0:
                with suppress(torch.OutOfMemoryError):  # another process has taken it meanwhile
                    torch.empty(missing, dtype=torch.uint8, device=device)


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
