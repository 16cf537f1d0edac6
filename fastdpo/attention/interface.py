"""Packed attention inside transformers models, through its own registries and keyword arguments.

`packed_forward` runs a model with the attention "fastdpo". Where the keyword `packed_layout` reaches an attention
layer, that layer runs packed; a model that drops it on the way gives unpacked attention, whose results differ, which
`fastdpo.models.verify_packing` detects. Without the keyword, "fastdpo" is transformers' own SDPA attention, so a model
that keeps the name still generates and evaluates as before.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdpo.attention.select import select_backend
from fastdpo.packing.layout import PackedLayout

ATTENTION_NAME = "fastdpo"
# Masks are built once, at the top of a model's forward, by a function that sees none of the keyword arguments.
_packed = contextvars.ContextVar("fastdpo_packed", default=False)
_seen_layers: contextvars.ContextVar[set[int] | None] = contextvars.ContextVar("fastdpo_seen_layers", default=None)


@lru_cache(None)
def register() -> None:
    """Registers the attention and its mask with transformers; more than once does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


def attention_mask(*args: Any, **kwargs: Any) -> Any:
    """No mask in a packed forward, where the layout says what is seen; else that of SDPA."""
    if _packed.get():
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H_kv, T, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_layout: PackedLayout | None = None,
    attention_backend: str = "auto",
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it; returns ((1, T, H, d), None)."""
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    seen = _seen_layers.get()
    if seen is not None:
        seen.add(id(module))
    for option in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(option) is not None:
            raise ValueError(
                f"packed attention has no {option}, which {type(module).__name__} needs; use packing='padded'."
            )
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention_mask: the layout says what each token sees.")
    dtype = value.dtype
    if torch.is_autocast_enabled(value.device.type):  # variable-length kernels are no autocast operations
        dtype = torch.get_autocast_dtype(value.device.type)
    query, key, value = (tensor.squeeze(0).transpose(0, 1).to(dtype) for tensor in (query, key, value))  # (T, H, d)
    if packed_layout.kv_index is not None:
        key, value = key.index_select(0, packed_layout.kv_index), value.index_select(0, packed_layout.kv_index)
    backend = select_backend(attention_backend, query.device, query.dtype)
    out = backend.attend(query, key, value, packed_layout, scale=scaling, window=sliding_window, dropout=dropout)
    return out.unsqueeze(0), None


@contextmanager
def packed_forward(model: Any) -> Iterator[None]:
    """Within it, a forward of `model` (a transformers model) with `packed_layout=` runs packed.

    The name of the attention stays set afterwards: gradient checkpointing runs layers again in the backward.
    """
    register()
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


@contextmanager
def count_packed_layers() -> Iterator[set[int]]:
    """Collects the attention layers that run packed within it."""
    layers: set[int] = set()
    token = _seen_layers.set(layers)
    try:
        yield layers
    finally:
        _seen_layers.reset(token)
