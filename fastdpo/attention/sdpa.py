"""Packed attention by PyTorch's scaled_dot_product_attention, a segment at a time: CPU, float32, float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.packing.layout import PackedLayout


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * q @ k.T + causal mask) @ v within each segment of the layout, causal from the bottom right.

    query (T, H, d), key and value (K, H_kv, d) already gathered; H a multiple of H_kv. `window`: how many keys each
    query sees, itself counted. Returns (T, H, d).
    """
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and query.device.type == "cpu"  # there the fast kernel reads each key head for its group
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # Heads first: (1, H, T, d)
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    parts = zip(
        query.split(layout.q_lengths, 2), key.split(layout.k_lengths, 2), value.split(layout.k_lengths, 2), strict=True
    )
    out = []
    for q, k, v in parts:
        mask = _mask(layout, q.shape[2], k.shape[2], window, query.device)
        out.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and q.shape[2] > 1,
                scale=scale,
                dropout_p=dropout,
                enable_gqa=grouped,
            )
        )
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)


def _mask(
    layout: PackedLayout, q_length: int, k_length: int, window: int | None, device: torch.device
) -> Tensor | None:
    """(q, k) True where query i may see key j; None where plain causality, or no mask, says the same.

    Query i stands at position k_length - q_length + i of the segment's keys.
    """
    if window is not None and window >= k_length:
        window = None
    if window is None and (q_length == k_length or q_length == 1):
        return None
    wanted = (q_length, k_length, window)
    if wanted not in layout.masks:
        position = torch.arange(k_length - q_length, k_length, device=device).unsqueeze(1)
        keys = torch.arange(k_length, device=device)
        mask = keys <= position
        if window is not None:
            mask &= keys > position - window
        layout.masks[wanted] = mask
    return layout.masks[wanted]
