"""How much memory the head may take, and what is done with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


# What was free on a GPU when it was first asked, by (index, whether for passes with gradients): see `memory_at_first`.
_free_at_first: dict[tuple[int, bool], int] = {}


def memory_at_first(device: torch.device, training: bool) -> int:
    """Bytes that were free on a GPU when the process first asked, kept for as long as it runs.

    training: for passes that form gradients. These are asked for apart: a reference is often scored first, with a GPU
        that is still empty.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, training) not in _free_at_first:
        _free_at_first[index, training] = free_memory(device)
    return _free_at_first[index, training]


# torch.compile calls it while it traces and keeps the value. This is the mark that
# torch.compiler.assume_constant_result leaves; calling that would import torch._dynamo, and with it triton.
memory_at_first._dynamo_marked_constant = True  # type: ignore[attr-defined]


def default_budget(device: torch.device, free: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes for logits (., V) in the dtype of the products: the one home of the choice.

    On a GPU an eighth of the free memory, but at least what a tile of `FULL_SPEED_ROWS` takes as far as half of the
    free memory holds it. Elsewhere 64 MiB, whatever is free: the choice also decides how sums are rounded.
    """
    if device.type != "cuda":
        return CPU_BUDGET
    return max(1, free // 8, min(FULL_SPEED_ROWS * row_bytes(vocabulary, dtype), free // 2))


def resolve_budget(
    memory_budget: int | None, device: torch.device, vocabulary: int, dtype: torch.dtype, *, training: bool
) -> int:
    """The budget that was asked for, or the default with the memory that was free at first.

    Raises:
        ValueError: it is no number of bytes above 0.
    """
    if memory_budget is None:
        free = memory_at_first(device, training) if device.type == "cuda" else 0
        return default_budget(device, free, vocabulary, dtype)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget!r}; it must be a number of bytes above 0, or None.")
    return memory_budget


def row_bytes(vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes of one row of logits in our buffers."""
    return max(1, row_stride(vocabulary) * dtype.itemsize)


def rows_within(memory_budget: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows of logits that the budget holds; one row is the least that can be worked with."""
    return max(1, memory_budget // row_bytes(vocabulary, dtype))


def plan(n: int, vocabulary: int, dtype: torch.dtype, memory_budget: int, *, keep: bool) -> Tiling:
    """What to do with N rows: with `keep`, all are kept where they fit, else what is left beside a full tile."""
    rows = rows_within(memory_budget, vocabulary, dtype)
    if not keep:
        return Tiling(min(rows, LARGEST_TILE), 0)
    if n <= rows:
        return Tiling(1, n)
    tile = min(rows, FULL_SPEED_ROWS)
    return Tiling(tile, rows - tile)


@contextmanager
def named_if_out_of_memory(rows: int, vocabulary: int, dtype: torch.dtype) -> Iterator[None]:
    """Within it, an error that says the device is out of memory also says what the head's share is, and what to do.

    The tile stays what it was: a smaller one would round otherwise, on this device alone.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = rows * row_bytes(vocabulary, dtype)
        error.args = (
            f"{error}\nThis was in the language-model head, which takes logits of {rows} tokens ({size} bytes) at a "
            f"time. Pass a smaller memory_budget (in bytes; {size // 2}, say) for a smaller tile.",
        )
        raise
