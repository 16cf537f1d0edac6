"""Packed attention inside transformers models, through its own registries and keyword arguments.

`packed_forward` runs a model with the attention "fastdpo". Where the keyword `packed_layout` reaches an attention
layer, that layer runs packed; a model that drops it on the way gives unpacked attention, whose results differ, which
`fastdpo.verify` detects. Without the keyword, "fastdpo" is transformers' own SDPA attention, so a model
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

from fastdpo.attention.contract import Needs
from fastdpo.attention.masks import WindowMask, recognize
from fastdpo.attention.sdpa import causal_mask, open_attention
from fastdpo.attention.select import select_backend
from fastdpo.packing.layout import PackedLayout

ATTENTION_NAME = "fastdpo"
# Masks are built once, at the top of a model's forward, by a function that sees none of the keyword arguments.
_packed = contextvars.ContextVar("fastdpo_packed", default=False)
_counted: list[torch.nn.Module] | None = None  # read in compiled layers, where a context variable could not be


@lru_cache(None)
def register() -> None:
    """Registers the attention and its mask with transformers; more than once does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


def attention_mask(*args: Any, **kwargs: Any) -> Any:
    """In a packed forward, what the mask says beside what the layout does (None or a WindowMask); else that of SDPA."""
    if _packed.get():
        return recognize(kwargs["mask_function"], kwargs.get("local_size"))
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H_kv, T, d)
    value: Tensor,
    attention_mask: Tensor | WindowMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_layout: PackedLayout | None = None,
    attention_backend: str = "auto",
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it; returns ((1, T, H, d), None)."""
    if packed_layout is None:  # StableLM and Nemotron pass their attention the positions alone
        packed = getattr(kwargs.get("position_ids"), "packed", {})
        packed_layout = packed.get("packed_layout")
        attention_backend = packed.get("attention_backend", attention_backend)
    for option in ("indices", "block_indices"):  # of sparse attention, which asks any attention but its own for it
        if kwargs.get(option) is not None:
            raise ValueError(f"there is no sparse attention here, which {type(module).__name__} asks for by {option}.")
    if packed_layout is None:
        assert not isinstance(attention_mask, WindowMask)
        return _unpacked(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal,
            position_bias=position_bias, softcap=softcap, s_aux=s_aux, **kwargs,
        )  # fmt: skip
    if _counted is not None:
        _counted.append(module)
    name = type(module).__name__
    if position_bias is not None:
        raise ValueError(f"packed attention has no position_bias, which {name} needs; use packing='padded'.")
    if is_causal is False:
        raise ValueError(f"packed attention is causal, and {name} is not; use packing='padded'.")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{name} attends to {key.shape[2]} keys for {query.shape[2]} tokens; use packing='padded'.")
    if attention_mask is not None and not isinstance(attention_mask, WindowMask):
        raise ValueError("packed attention takes no attention_mask: the layout says what each token sees.")
    window = None if attention_mask is None else attention_mask.window
    if sliding_window is not None and sliding_window != window:
        raise ValueError(f"{name} has a sliding window of {sliding_window}, and its mask says {window or 'none'}.")
    dtype = value.dtype
    if torch.is_autocast_enabled(value.device.type):  # variable-length kernels are no autocast operations
        dtype = torch.get_autocast_dtype(value.device.type)
    query, key, value = (tensor.squeeze(0).transpose(0, 1).to(dtype) for tensor in (query, key, value))  # (T, H, d)
    features: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": s_aux, "dropout": dropout}
    backend = select_backend(attention_backend, Needs.of(query, value, **features))
    out = backend.attend(query, key, value, packed_layout, scale=scaling, **features)
    return out.contiguous().unsqueeze(0), None


def _unpacked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    softcap: float | None, s_aux: Tensor | None, scaling: float | None, dropout: float, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """SDPA of transformers, for generation and padded batches; softcap and sinks, which it lacks, in the open."""
    if softcap is None and s_aux is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attention_mask is None:  # that of SDPA leaves plain causality out
        attention_mask = causal_mask(query.shape[2], key.shape[2], None, query.device)
    out = open_attention(
        query, key, value, attention_mask, scale=scaling, softcap=softcap, sinks=s_aux, dropout=dropout
    )
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def packed_forward(model: Any) -> Iterator[None]:
    """Within it, a forward of `model` (a transformers model) with `packed_layout=` runs packed.

    The model has its own attention again afterwards, unless gradient checkpointing is going to run layers a second time
    in the backward: then whoever runs that backward restores it (`attention_of`).
    """
    own = set_attention(model)
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)
        if own and not (torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False)):
            restore_attention(own)


def set_attention(model: Any) -> list[tuple[Any, str | None]]:
    """Gives a model the attention "fastdpo"; what `restore_attention` takes, nothing where it has it already."""
    register()
    if model.config._attn_implementation == ATTENTION_NAME:
        return []
    own = [] if torch.compiler.is_compiling() else attention_of(model)
    model.set_attn_implementation(ATTENTION_NAME)
    return own


def attention_of(model: Any) -> list[tuple[Any, str | None]]:
    """(config, name of its attention) of a transformers model and of all models within it."""
    configs = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs.setdefault(id(config), config)
    return [(config, config._attn_implementation_internal) for config in configs.values()]


def restore_attention(attention: list[tuple[Any, str | None]]) -> None:
    for config, name in attention:
        config._attn_implementation_internal = name


@contextmanager
def packed_layers() -> Iterator[list[torch.nn.Module]]:
    """Collects the attention layers that run packed within it, as often as they do."""
    global _counted
    before, _counted = _counted, []
    try:
        yield _counted
    finally:
        _counted = before
