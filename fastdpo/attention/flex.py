"""Packed attention by PyTorch's FlexAttention, for softcap and sinks on a GPU. Nothing is gathered:

    row i sees row j  <=>  j <= i < subtree_end[j]  and  positions[i] - positions[j] < window

The block mask follows from the layout by reductions over blocks of rows, without a (T, T) mask.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.attention.contract import Backend, Needs
from fastdpo.packing.layout import PackedLayout

BLOCK = 128
SMALLEST_HEAD = 16  # the least that a matrix product in Triton takes; on a CPU there is no such limit


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
    """See `Backend`. With the log-sum-exp of a row without its sink, softmax with a sink is
    softmax(s) * sigmoid(logsumexp(s) - sink)."""
    assert not dropout
    wanted = ("flex", window)
    if wanted not in layout.masks:
        layout.masks[wanted] = block_mask(layout, window)
    flex = flex_attention_module()
    score_mod = None
    if softcap is not None:

        def score_mod(score: Tensor, *place: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))  # (1, H, T, d)
    out = compiled_flex_attention()(
        query, key, value, score_mod=score_mod, block_mask=layout.masks[wanted], scale=scale,
        enable_gqa=query.shape[1] != key.shape[1], return_aux=flex.AuxRequest(lse=True) if sinks is not None else None,
    )  # fmt: skip
    if sinks is not None:
        out, aux = out
        out = out * torch.sigmoid(aux.lse - sinks.view(1, -1, 1).to(aux.lse.dtype)).unsqueeze(-1).to(out.dtype)
    return out.squeeze(0).transpose(0, 1)


def block_mask(layout: PackedLayout, window: int | None) -> Any:
    """The BlockMask of a layout: which blocks of keys a block of queries sees, and which of these it sees whole."""
    ends, positions = layout.subtree_end, layout.positions

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen = (key <= row) & (row < ends[key])
        return seen if window is None else seen & (positions[row] - positions[key] < window)

    num_rows = ends.shape[0]
    blocks = -(-num_rows // BLOCK)
    padding = (0, blocks * BLOCK - num_rows)
    last_end, first_end = (
        F.pad(ends, padding, value=fill).view(blocks, BLOCK) for fill in (0, num_rows + blocks * BLOCK)
    )
    first = torch.arange(blocks, device=ends.device) * BLOCK
    rows, keys = first.unsqueeze(1), first.unsqueeze(0)
    before = keys < rows
    some = (before & (last_end.amax(1) > rows)) | (keys == rows)
    whole = before & (first_end.amin(1) >= rows + BLOCK)
    if window is not None:
        low = F.pad(positions, padding, value=num_rows).view(blocks, BLOCK).amin(1)
        high = F.pad(positions, padding, value=-1).view(blocks, BLOCK).amax(1)
        some &= low.unsqueeze(1) - high.unsqueeze(0) < window
        whole &= high.unsqueeze(1) - low.unsqueeze(0) < window
    part, whole = (some & ~whole), (some & whole)

    def listed(grid: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of each row are set, and their numbers, these first."""
        order = torch.argsort(grid.int(), dim=1, descending=True, stable=True).int()
        return grid.sum(1, dtype=torch.int32)[None, None], order[None, None].contiguous()

    return flex_attention_module().BlockMask.from_kv_blocks(
        *listed(part), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(num_rows, num_rows)
    )


def _lacks(needs: Needs) -> str | None:
    if needs.device != "cuda":
        return f"runs on GPUs only, and the model is on {needs.device}"
    if needs.dtype == torch.float64:
        return "takes no float64"
    smallest = min(needs.head_dim, needs.value_head_dim)
    if smallest < SMALLEST_HEAD:
        return f"takes heads of at least {SMALLEST_HEAD} channels, and these have {smallest}"
    return "has no dropout" if needs.dropout else None


FLEX = Backend("flex", attend, _lacks)


@lru_cache(None)
def flex_attention_module() -> Any:
    return importlib.import_module("torch.nn.attention.flex_attention")


@lru_cache(None)
def compiled_flex_attention() -> Any:
    """Compiled once for all lengths: uncompiled, it would form all scores."""
    return torch.compile(flex_attention_module().flex_attention, dynamic=True)
