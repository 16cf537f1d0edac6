"""Packed attention by variable-length kernels on a GPU: the package flash-attn, or PyTorch's own varlen_attn.

Both take the layout as it is: cu_seqlens_q and cu_seqlens_k differ where a segment's keys begin with a shared prefix,
and both align the causal mask to the bottom right of each segment. What an installed version can do is read off its
signature. Sinks are left to other backends: where flash-attn takes them, it gives them no gradient.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.attention.contract import Backend, Needs, gathered
from fastdpo.packing.layout import PackedLayout

# Newest first; 3 has its kernels for Hopper, 4 for Hopper and later.
FLASH_ATTN_MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}
LARGEST_HEAD = 256


def attend_flash_attn(
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
    """flash_attn_varlen_func of flash-attn 2, 3 or 4; see `Backend`."""
    kernel = installed("flash_attn")
    assert kernel is not None and sinks is None
    key, value = gathered(key, value, layout)
    options: dict[str, Any] = {
        "cu_seqlens_q": layout.cu_seqlens_q,
        "cu_seqlens_k": layout.cu_seqlens_k,
        "softmax_scale": scale,
        "causal": True,
    }
    if "max_seqlen_q" in kernel.parameters:
        options |= {"max_seqlen_q": layout.max_seqlen_q, "max_seqlen_k": layout.max_seqlen_k}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if softcap is not None:
        options["softcap"] = softcap
    if dropout:
        options["dropout_p"] = dropout
    out = kernel.function(query, key, _as_wide(value, query), **options)
    out = out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp too
    return out[..., : value.shape[-1]]


def attend_torch_varlen(
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
    """torch.nn.attention.varlen.varlen_attn, whose signature has moved between releases; see `Backend`."""
    kernel = installed("torch_varlen")
    assert kernel is not None and softcap is None and sinks is None and not dropout
    key, value = gathered(key, value, layout)
    names = kernel.parameters
    groups = query.shape[1] // key.shape[1]
    width, wide_value = value.shape[-1], _as_wide(value, query)
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in names:
        options["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    else:
        assert window is None
        options["is_causal"] = True
    if "enable_gqa" in names:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key, wide_value = key.repeat_interleave(groups, 1), wide_value.repeat_interleave(groups, 1)
    if "scale" not in names:  # the kernel then scales by 1 / sqrt(d)
        if scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)
        del options["scale"]
    out = kernel.function(
        query, key, wide_value, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k,
        **options,
    )  # fmt: skip
    return out[..., :width]


def _as_wide(value: Tensor, query: Tensor) -> Tensor:
    """Values as wide as the queries, with zeros: kernels take one head size (multi-head latent attention has two)."""
    missing = query.shape[-1] - value.shape[-1]
    return F.pad(value, (0, missing)) if missing > 0 else value


def _kernel_lacks(needs: Needs) -> str | None:
    if needs.device != "cuda":
        return f"runs on GPUs only, and the model is on {needs.device}"
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16 only, and the attention runs in {needs.dtype}"
    if needs.head_dim > LARGEST_HEAD:
        return f"takes heads of at most {LARGEST_HEAD} channels, and these have {needs.head_dim}"
    return "gives attention sinks no gradient" if needs.sinks else None


def _flash_attn_lacks(needs: Needs) -> str | None:
    kernel = installed("flash_attn")
    if kernel is None:
        return "is not there; pip install flash-attn"
    why = _kernel_lacks(needs)
    if why is None:
        wanted = {"softcap": needs.softcap, "dropout_p": needs.dropout, "window_size": needs.window}
        missing = [name for name, needed in wanted.items() if needed and name not in kernel.parameters]
        why = f"has no {missing[0]} in the version installed" if missing else None
    return why


def _torch_varlen_lacks(needs: Needs) -> str | None:
    kernel = installed("torch_varlen")
    if kernel is None:
        return "is not there; it comes with torch 2.10 and later"
    why = _kernel_lacks(needs)
    if why is None:
        for feature in ("softcap", "dropout"):
            if getattr(needs, feature):
                return f"has no {feature}"
        if needs.window and "window_size" not in kernel.parameters:
            return "has no sliding window in this torch; install flash-attn, or a newer torch"
    return why


FLASH_ATTN = Backend("flash_attn", attend_flash_attn, _flash_attn_lacks)
TORCH_VARLEN = Backend("torch_varlen", attend_torch_varlen, _torch_varlen_lacks)


class Kernel(NamedTuple):
    function: Any
    parameters: frozenset[str]


_installed: dict[str, Kernel | None] = {}  # a dictionary and no cached function: compiled layers read it


def installed(name: str) -> Kernel | None:
    if not _installed:
        _installed.update(flash_attn=_flash_attn(), torch_varlen=_found("torch.nn.attention.varlen", "varlen_attn"))
    return _installed[name]


def _flash_attn() -> Kernel | None:
    """flash_attn_varlen_func of the newest flash-attn installed that has kernels for this GPU."""
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    for version, module in FLASH_ATTN_MODULES.items():
        if (version == 4 and major < 9) or (version == 3 and major != 9):
            continue
        kernel = _found(module, "flash_attn_varlen_func")
        if kernel is not None:
            return kernel
    return None


def _found(module: str, name: str) -> Kernel | None:
    try:
        return described(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError):
        return None


def described(function: Any) -> Kernel:
    return Kernel(function, frozenset(inspect.signature(function).parameters))
