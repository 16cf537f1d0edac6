"""Packed attention by variable-length kernels on a GPU: the package flash-attn, or PyTorch's own varlen_attn.

Both take the layout as it is: cu_seqlens_q and cu_seqlens_k differ where a segment's keys begin with a shared prompt,
and both align the causal mask to the bottom right of each segment.
"""

from __future__ import annotations

import importlib
import inspect
from functools import lru_cache
from typing import Any

from torch import Tensor

from fastdpo.packing.layout import PackedLayout


def attend_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """flash_attn_varlen_func of flash-attn 3 or 2. Shapes as in `fastdpo.attention.sdpa.attend`."""
    function = flash_attn_function()
    assert function is not None
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
    }
    if "dropout_p" in _parameters(function):
        options["dropout_p"] = dropout
    elif dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported by this flash-attn; "
            "set disable_dropout=True or choose the attention backend 'sdpa'."
        )
    out = function(
        query, key, value, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k, **options
    )
    return out[0] if isinstance(out, tuple) else out  # flash-attn 3 returned the log-sum-exp too, at times


def attend_torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scale: float | None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn. Shapes as in `fastdpo.attention.sdpa.attend`."""
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported by torch's varlen_attn; "
            "set disable_dropout=True or choose the attention backend 'sdpa'."
        )
    function = torch_varlen_function()
    assert function is not None
    parameters = _parameters(function)
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in parameters:
        options["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise ValueError("this torch's varlen_attn has no sliding window; install flash-attn, or a newer torch.")
    if "enable_gqa" in parameters:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if "scale" not in parameters:  # the kernel then scales by 1 / sqrt(d)
        if scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)
        del options["scale"]
    return function(
        query, key, value, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k, **options
    )


@lru_cache(None)
def flash_attn_function() -> Any:
    """flash_attn_varlen_func of the newest flash-attn installed, or None."""
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            return importlib.import_module(module).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
    return None


@lru_cache(None)
def torch_varlen_function() -> Any:
    try:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)
