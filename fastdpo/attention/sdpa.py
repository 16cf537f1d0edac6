"""Packed attention by PyTorch's scaled_dot_product_attention, a segment at a time: any device, any dtype.

Softcap and sinks it does not have; with them the scores of a segment are formed in the open.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.attention.contract import Backend, gathered
from fastdpo.packing.layout import PackedLayout


@torch.compiler.disable  # its loop over the segments would be compiled again for every batch
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """See `Backend`."""
    key, value = gathered(key, value, layout)
    groups = query.shape[1] // key.shape[1]
    plain = softcap is None and sinks is None
    grouped = groups > 1 and plain and query.device.type == "cpu"
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # Heads first: (1, H, T, d)
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    parts = zip(
        query.split(layout.q_lengths, 2), key.split(layout.k_lengths, 2), value.split(layout.k_lengths, 2), strict=True
    )
    out = []
    for q, k, v in parts:
        if plain:
            mask = _mask(layout, q.shape[2], k.shape[2], window, query.device)
            causal = mask is None and q.shape[2] > 1
            segment = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=grouped
            )
        else:
            seen = _seen(layout, q.shape[2], k.shape[2], window, query.device)
            segment = open_attention(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
        out.append(segment)
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)


SDPA = Backend("sdpa", attend, lambda needs: None)


def open_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, scale: float | None, softcap: float | None,
    sinks: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """The equation of `Backend`, all scores formed: (B, H, q, d), (B, H, k, d), (B, H, k, d_v) -> (B, H, q, d_v).

    `seen` is True where a query sees a key; it broadcasts to (B, H, q, k).
    """
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(2, 3)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)  # of padding that sees nothing, no NaN
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _mask(
    layout: PackedLayout, q_length: int, k_length: int, window: int | None, device: torch.device
) -> Tensor | None:
    """`_seen`, or None where plain causality, or no mask, says the same."""
    narrow = window is not None and window < k_length
    if not narrow and (q_length == k_length or q_length == 1):
        return None
    return _seen(layout, q_length, k_length, window if narrow else None, device)


def _seen(layout: PackedLayout, q_length: int, k_length: int, window: int | None, device: torch.device) -> Tensor:
    wanted = (q_length, k_length, window)
    if wanted not in layout.masks:
        layout.masks[wanted] = causal_mask(q_length, k_length, window, device)
    return layout.masks[wanted]


def causal_mask(q_length: int, k_length: int, window: int | None, device: torch.device) -> Tensor:
    """(q, k) True where query i sees key j. Query i stands at position k_length - q_length + i of the keys."""
    position = torch.arange(k_length - q_length, k_length, device=device).unsqueeze(1)
    keys = torch.arange(k_length, device=device)
    mask = keys <= position
    return mask if window is None else mask & (keys > position - window)
