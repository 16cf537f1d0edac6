"""What a model's attention mask says, told apart: plain causality, or a sliding window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

FAR = 1 << 20


@dataclass(frozen=True)
class WindowMask:
    """In the place of a mask tensor: every token sees the `window` last tokens of its sequence, itself counted."""

    window: int


@lru_cache(None)
def window_mask(window: int) -> WindowMask:
    return WindowMask(window)  # one object a window, so that compiled layers see the same one every time


def recognize(mask_function: Callable[..., Any], local_size: int | None) -> WindowMask | None:
    """The mask of a function of (batch, head, query position, key position); None for plain causality.

    It is asked at places that tell the two apart from chunks, bidirectional blocks and the like, far beyond the lengths
    at hand: a small batch would not show a window of thousands.

    Raises:
        ValueError: it is neither.
    """
    window = FAR if local_size is None else int(local_size)
    queries = {0, 1, 2, 3, 7, window - 1, window, window + 1, 2 * window, 2 * window + 3, 3 * window - 1, FAR, FAR + 1}
    pairs = [
        (q, k)
        for q in sorted(queries)
        for k in (0, 1, q // 2, q - window - 1, q - window, q - window + 1, q - 1, q, q + 1, q + window)
        if k >= 0
    ]
    q, k = torch.tensor(pairs).unbind(1)
    expected = k <= q if local_size is None else (k <= q) & (k > q - window)
    zero = torch.zeros((), dtype=torch.int64)
    try:
        seen = torch.as_tensor(mask_function(zero, zero, q, k)).expand(len(pairs))
    except (TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(f"its attention mask depends on more than the two positions ({error})") from error
    if not torch.equal(seen, expected):
        raise ValueError("its attention mask is neither causal nor a sliding window (chunks, or blocks that see ahead)")
    return None if local_size is None else window_mask(window)
