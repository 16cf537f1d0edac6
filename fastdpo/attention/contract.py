"""What every attention backend computes, and what a call may ask of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.ops import gather_kv
from fastdpo.packing.layout import PackedLayout


@dataclass(frozen=True)
class Needs:
    """Of one attention call: where and in what it runs, and which of the model's features it has."""

    device: str
    dtype: torch.dtype
    head_dim: int = 64
    value_head_dim: int = 64
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    window: bool = False

    @classmethod
    def of(
        cls, query: Tensor, value: Tensor, *, window: int | None, softcap: float | None, sinks: Tensor | None,
        dropout: float,
    ) -> Needs:  # fmt: skip
        """Those of the call `Backend.attend(query, ..., value, ...)`."""
        return cls(
            device=query.device.type, dtype=query.dtype, head_dim=query.shape[-1], value_head_dim=value.shape[-1],
            softcap=softcap is not None, sinks=sinks is not None, dropout=dropout > 0, window=window is not None,
        )  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """One way to run attention over a packed row.

    attend(query, key, value, layout, *, scale, window, softcap, sinks, dropout) -> out, for each sequence of the layout

        s = scale * q @ k.T                  scale None: 1 / sqrt(d)
        s = softcap * tanh(s / softcap)
        s = where(k's position in (q's - window, q's], s, -inf)
        p = softmax([s, sinks])[:-1]         one sink a head: a score without a value
        out = dropout(p) @ v

    query (T, H, d), key (T, H_kv, d), value (T, H_kv, d_v) with H a multiple of H_kv, each head of keys serving as many
    heads of queries; out (T, H, d_v). `window`: how many keys a query sees, itself counted; None: all before it.

    lacks(needs) -> why it cannot serve, or None
    """

    name: str
    attend: Callable[..., Tensor]
    lacks: Callable[[Needs], str | None]


def gathered(key: Tensor, value: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """(K, H_kv, d), (K, H_kv, d_v): the keys and values of every segment, one behind the other."""
    if layout.kv_index is None:
        return key, value
    assert layout.kv_copies is not None and layout.kv_offsets is not None
    return gather_kv(key, value, layout.kv_index, layout.kv_copies, layout.kv_offsets)
