"""Which implementation serves a tensor, and the checks that every operation makes of its arguments."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "eager")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True)
class LogitOptions:
    """z = softcap * tanh(logit_scale * x / softcap) / temperature, and the label that stands for "no target"."""

    ignore_index: int
    temperature: float
    softcap: float | None
    logit_scale: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be a number above 0.")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}; it must be a number above 0, or None for no cap.")

    def as_arguments(self) -> tuple[int, float, float | None, float]:
        """In the order in which every operator takes them."""
        return self.ignore_index, float(self.temperature), self.softcap, float(self.logit_scale)

    def kwargs(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "temperature": self.temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }


@lru_cache(None)
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def implementation(impl: str, tensor: Tensor) -> str:
    """Which of "triton" and "eager" works on `tensor`.

    "auto" is Triton on a GPU, except for float64, and eager PyTorch elsewhere.
    """
    check_impl(impl)
    on_gpu = tensor.device.type == "cuda"
    if impl == "auto":
        impl = "triton" if on_gpu and has_triton() and tensor.dtype != torch.float64 else "eager"
    if impl == "eager":
        return impl
    if tensor.dtype == torch.float64:
        raise ValueError("impl='triton' works in float32 and does not take float64 tensors; use impl='eager' for them.")
    if not has_triton():
        raise ValueError("impl='triton' needs the package triton (pip install triton); impl='eager' works without it.")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' needs a GPU, but the tensor is on {tensor.device}; use impl='auto' or impl='eager', "
            "or set TRITON_INTERPRET=1 before the first call to run the kernels in Triton's interpreter."
        )
    return impl


class RowKernels(NamedTuple):
    """The functions of these names of one implementation."""

    token_logprobs_fwd: Callable[..., Any]
    token_logprobs_bwd: Callable[..., Any]
    token_logprobs_fwd_grad: Callable[..., Any]


def row_kernels(impl: str, tensor: Tensor) -> RowKernels:
    """The row kernels that work on `tensor`."""
    if implementation(impl, tensor) == "eager":
        from fastdpo_kernels import eager

        return RowKernels(eager.token_logprobs_fwd, eager.token_logprobs_bwd, eager.token_logprobs_fwd_grad)
    from fastdpo_kernels.token_logprobs import token_logprobs_bwd, token_logprobs_fwd
    from fastdpo_kernels.token_logprobs_grad import token_logprobs_fwd_grad

    return RowKernels(token_logprobs_fwd, token_logprobs_bwd, token_logprobs_fwd_grad)


class GatherKernels(NamedTuple):
    """The functions of these names of one implementation."""

    gather_kv_fwd: Callable[..., tuple[Tensor, Tensor]]
    gather_kv_bwd: Callable[..., tuple[Tensor, Tensor]]


def gather_kernels(impl: str, tensor: Tensor) -> GatherKernels:
    """The gathers that work on `tensor`."""
    if implementation(impl, tensor) == "eager":
        from fastdpo_kernels.eager import gather_kv_bwd, gather_kv_fwd
    else:
        from fastdpo_kernels.gather_kv import gather_kv_bwd, gather_kv_fwd
    return GatherKernels(gather_kv_fwd, gather_kv_bwd)


def check_impl(impl: str) -> None:
    """Whether it can serve a tensor shows when it is asked to: see `implementation`."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(map(repr, IMPLEMENTATIONS))}.")


def check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {got}; it must be a floating-point tensor (bfloat16, float16, float32, float64).")


def check_integers(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {got}; it must be a tensor of integers (int64).")


def check_labels(labels: Tensor, shape: torch.Size | tuple[int, ...], like: Tensor, like_name: str) -> None:
    check_integers("labels", labels)
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, but {like_name} of shape {tuple(like.shape)} "
            f"needs labels of shape {tuple(shape)}."
        )
    check_device("labels", labels, like, like_name)


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {like_name} on {like.device}; move {name} with .to({like_name}.device)."
        )


def check_linear(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; it must be (N, D): one row a token.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; with hidden of shape {tuple(hidden.shape)} "
            f"it must be (V, {hidden.shape[1]})."
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the vocabulary (first dimension) must not be empty.")
    check_device("weight", weight, hidden, "hidden")
    check_labels(labels, hidden.shape[:1], hidden, "hidden")
    if bias is not None:
        check_float("bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; the weight's {weight.shape[0]} rows need "
                             f"({weight.shape[0]},).")  # fmt: skip
        check_device("bias", bias, hidden, "hidden")


def compute_dtype(hidden: Tensor, head_dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of the head's products: the one asked for, else autocast's where it is on, else that of hidden."""
    if head_dtype is not None:
        if head_dtype not in _FLOATS:
            raise ValueError(f"head_dtype is {head_dtype}; it must be one of {', '.join(map(str, _FLOATS))}, or None.")
        return head_dtype
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype
