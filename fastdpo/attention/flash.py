"""Packed attention by variable-length kernels on a GPU: the package flash-attn, or PyTorch's own varlen_attn.

All of them take the layout as it is: cu_seqlens_q and cu_seqlens_k differ where a segment's keys begin with a shared
prefix, the causal mask is aligned to the bottom right of each segment, and a head of keys serves several heads of
queries. Which options an installed version has is read off its signature; which sizes of heads it takes on which GPU is
not written there, and is said in `_sizes`.

flash-attn 4 is called directly, never by `torch.nn.attention.activate_flash_attention_impl("FA4")`. In torch 2.11 that
hands it PyTorch's -1 for "no bound" as a bound, with which no query sees any key, and refuses every backward of
varlen_attn. In any torch it replaces the kernels of the whole process, those of SDPA too.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from fastdpo.attention.contract import Backend, Needs, gathered
from fastdpo.packing.layout import PackedLayout

# Newest first; 3 has its kernels for Hopper, 4 for Hopper and later.
FLASH_ATTN_MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}
LARGEST_HEAD = 256
DEEPSEEK_HEADS = (192, 128)  # of queries and of values: the one pair of sizes that flash-attn 4 takes on Blackwell


class Kernel(NamedTuple):
    """A function, the names of its parameters, and for what it was built."""

    function: Any
    parameters: frozenset[str]
    version: int  # of flash-attn; 0 for PyTorch's
    capability: int  # the GPU's: 8 Ampere, 9 Hopper, 10 and 11 Blackwell, 12 Blackwell for desks


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
    needs = Needs.of(query, value, window=window, softcap=softcap, sinks=sinks, dropout=dropout)
    kernel = serving("flash_attn", needs)
    assert kernel is not None
    options: dict[str, Any] = {
        "cu_seqlens_q": layout.cu_seqlens_q,
        "cu_seqlens_k": layout.cu_seqlens_k,
        "max_seqlen_q": layout.max_seqlen_q,
        "max_seqlen_k": layout.max_seqlen_k,
        "softmax_scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "causal": True,
    }
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if softcap is not None:
        options["softcap"] = softcap
    if sinks is not None:
        options["learnable_sink"] = sinks
    if dropout:
        options["dropout_p"] = dropout
    if _deterministic():
        options["deterministic"] = True
    out = kernel.function(*_inputs(kernel, query, key, value, layout), **options)
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
    """torch.nn.attention.varlen.varlen_attn, whose signature has moved between releases; see `Backend`.

    That of torch 2.11 says nothing of grouped heads, but its kernel takes them as they are, backward too.
    """
    assert softcap is None and sinks is None and not dropout
    (kernel,) = installed("torch_varlen")
    options = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in kernel.parameters else {}
    out = kernel.function(
        *_inputs(kernel, query, key, value, layout),
        layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window_size=(-1 if window is None else window - 1, 0), **options,
    )  # fmt: skip
    return out[..., : value.shape[-1]]


def _inputs(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the keys and values of every segment, widened with zeros to a size of heads that the kernel takes.

    That is one size for the three of them, a multiple of 8 (multi-head latent attention has two sizes).
    """
    sizes = (query.shape[-1], value.shape[-1])
    widths = sizes if _takes_as_they_are(kernel, sizes) else (_width(*sizes),) * 2
    query, key, value = (
        F.pad(tensor, (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else tensor
        for tensor, width in ((query, widths[0]), (key, widths[0]), (value, widths[1]))
    )
    return query, *gathered(key, value, layout)


def _width(head_dim: int, value_head_dim: int) -> int:
    return -(-max(head_dim, value_head_dim) // 8) * 8


def _takes_as_they_are(kernel: Kernel, sizes: tuple[int, int]) -> bool:
    return kernel.version == 4 and kernel.capability in (10, 11) and sizes == DEEPSEEK_HEADS


@torch.compiler.assume_constant_result  # of the two, the compiler knows the first only
def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _misses(kernel: Kernel, needs: Needs) -> str | None:
    """Why a kernel cannot serve."""
    if needs.device != "cuda":
        return f"runs on GPUs only, and the model is on {needs.device}"
    if kernel.capability < 8:
        return f"runs on GPUs of compute capability 8.0 and later, and this one has {kernel.capability}"
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16 only, and the attention runs in {needs.dtype}"
    return _sizes(kernel, needs) or _features(kernel, needs)


def _sizes(kernel: Kernel, needs: Needs) -> str | None:
    """What flash-attn 4 takes is in its `_validate_head_dims`; for capability 12 what its shared memory holds."""
    sizes = (needs.head_dim, needs.value_head_dim)
    largest, others = LARGEST_HEAD, ""
    if kernel.version == 4 and kernel.capability >= 10:
        largest = 128
        if kernel.capability < 12:
            if _width(*sizes) == 256 or _takes_as_they_are(kernel, sizes):
                return None
            others = ", of 256, or of 192 with values of 128"
    if max(sizes) <= largest:
        return None
    return f"takes heads of at most {largest} channels{others}, and these have {max(sizes)}"


def _features(kernel: Kernel, needs: Needs) -> str | None:
    of = f"flash-attn {kernel.version}" if kernel.version else "this torch"
    where = f"{of} on compute capability {kernel.capability}"
    if needs.sinks and ("learnable_sink" not in kernel.parameters or kernel.capability not in (9, 10, 11)):
        return f"gives attention sinks no gradient ({where})"
    for feature, parameter in (("softcap", "softcap"), ("dropout", "dropout_p"), ("window", "window_size")):
        if getattr(needs, feature) and parameter not in kernel.parameters:
            return f"has no {feature} in {of}"
    if needs.softcap and needs.dropout:
        return f"has no dropout with softcap in {of}"
    if kernel.version == 4 and kernel.capability in (10, 11) and _width(needs.head_dim, needs.value_head_dim) == 256:
        for feature in ("softcap", "sinks"):
            if getattr(needs, feature):
                return f"has no {feature} for heads of 256 channels ({where})"
    deterministic = "deterministic" in kernel.parameters and (kernel.version, kernel.capability) != (4, 12)
    if kernel.version and _deterministic() and not deterministic:  # PyTorch's own sees to it itself
        return f"has no deterministic backward ({where})"
    return None


def _flash_attn_lacks(needs: Needs) -> str | None:
    kernels = installed("flash_attn")
    if not kernels:
        return 'is not there; pip install --no-build-isolation "fastdpo[flash]", or flash-attn-4 from 4.0.0b26 on'
    return None if serving("flash_attn", needs) is not None else _misses(kernels[0], needs)


def _torch_varlen_lacks(needs: Needs) -> str | None:
    kernels = installed("torch_varlen")
    if not kernels:
        return "is not there; it comes with torch 2.11 and later, built for CUDA"
    if "enable_gqa" not in kernels[0].parameters and current_flash_attention_impl() == "FA4":  # see above
        return "is wrong in torch 2.11 after activate_flash_attention_impl('FA4'); call restore_flash_attention_impl()"
    return _misses(kernels[0], needs)


FLASH_ATTN = Backend("flash_attn", attend_flash_attn, _flash_attn_lacks)
TORCH_VARLEN = Backend("torch_varlen", attend_torch_varlen, _torch_varlen_lacks)


def serving(name: str, needs: Needs) -> Kernel | None:
    """The newest kernel of a backend that can do what is needed."""
    for kernel in installed(name):
        if _misses(kernel, needs) is None:
            return kernel
    return None


_installed: dict[str, tuple[Kernel, ...]] = {}  # a dictionary and no cached function: compiled layers read it


def installed(name: str) -> tuple[Kernel, ...]:
    """The kernels of a backend that were built for this GPU, newest first."""
    if not _installed:
        capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
        flash_attn = (_flash_attn(version, capability) for version in FLASH_ATTN_MODULES)
        _installed.update(flash_attn=tuple(filter(None, flash_attn)), torch_varlen=_torch_varlen(capability))
    return _installed[name]


def _flash_attn(version: int, capability: int) -> Kernel | None:
    if (version == 4 and capability < 9) or (version == 3 and capability != 9):
        return None
    module = FLASH_ATTN_MODULES[version]
    kernel = _found(module, "flash_attn_varlen_func", version, capability)
    if kernel is not None and version == 4:
        # Versions before 4.0.0b26 give sinks no gradient, and lack other parts of the backward: those that came with
        # flash-attn 2.8 all of it for sequences of unequal lengths.
        backward = _found(f"{module}.interface", "_flash_attn_bwd", version, capability)
        if backward is None or "learnable_sink" not in backward.parameters:
            return None
    return kernel


def _torch_varlen(capability: int) -> tuple[Kernel, ...]:
    if not torch.backends.cuda.is_flash_attention_available():
        return ()
    kernel = _found("torch.nn.attention.varlen", "varlen_attn", 0, capability)
    return (kernel,) if kernel is not None and "window_size" in kernel.parameters else ()


def _found(module: str, name: str, version: int, capability: int) -> Kernel | None:
    try:
        return described(getattr(importlib.import_module(module), name), version, capability)
    except (ImportError, AttributeError):
        return None


def described(function: Any, version: int, capability: int) -> Kernel:
    parameters = frozenset(inspect.signature(function).parameters)
    if version == 4:  # it compiles its kernels when it is called, and is no operator that could be traced
        function = torch.compiler.disable(function)
    return Kernel(function, parameters, version, capability)
