"""How much memory the head may take, and what is done with it."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from fastdpo.device import free_memory
from fastdpo_kernels.linear_logprobs import row_stride

# A tile of this many rows runs its products at full speed on any GPU; memory beyond it is better spent on keeping.
FULL_SPEED_ROWS = 4096
LARGEST_TILE = 16384
# On a CPU a tile of a few hundred rows already runs the products at full speed, and a larger one leaves the caches.
CPU_BUDGET = 1 << 26


class Tiling(NamedTuple):
    """Rows of logits (., V): `tile` at a time in one buffer, and `kept` for good, of which the gradient is made."""

    tile: int
    kept: int


def default_budget(device: torch.device) -> int:
    """Bytes for logits: an eighth of the free memory; on a GPU at least 256 MiB, on a CPU at most 64 MiB."""
    if device.type == "cuda":
        return max(free_memory(device) // 8, 1 << 28)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return CPU_BUDGET
    return min(max(free // 8, 1 << 20), CPU_BUDGET)


# torch.compile calls it while it traces and keeps the answer. This is the mark that
# torch.compiler.assume_constant_result leaves; calling that would import torch._dynamo, and with it triton.
default_budget._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve_budget(memory_budget: int | None, device: torch.device) -> int:
    if memory_budget is None:
        return default_budget(device)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget!r}; it must be a number of bytes above 0, or None.")
    return memory_budget


def rows_within(memory_budget: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows of logits that the budget holds; one row is the least that can be worked with."""
    return max(1, memory_budget // max(1, row_stride(vocabulary) * dtype.itemsize))


def plan(n: int, vocabulary: int, dtype: torch.dtype, memory_budget: int, *, keep: bool) -> Tiling:
    """What to do with N rows: with `keep`, all are kept where they fit, else what is left beside a full tile."""
    rows = rows_within(memory_budget, vocabulary, dtype)
    if not keep:
        return Tiling(min(rows, LARGEST_TILE), 0)
    if n <= rows:
        return Tiling(1, n)
    tile = min(rows, FULL_SPEED_ROWS)
    return Tiling(tile, rows - tile)
