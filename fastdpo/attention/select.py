"""Which attention backend serves a device and a dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.attention import flash, sdpa


@dataclass(frozen=True)
class Backend:
    """attend(query (T, H, d), key, value (K, H_kv, d), layout, *, scale, window, dropout) -> (T, H, d)"""

    name: str
    attend: Callable[..., Tensor]
    half_on_gpu_only: bool
    installed: Callable[[], bool]
    remedy: str = ""

    def lacks(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve, or None."""
        if self.half_on_gpu_only and device.type != "cuda":
            return f"runs on GPUs only, and the model is on {device}"
        if self.half_on_gpu_only and dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16 only, and the attention runs in {dtype}"
        return None if self.installed() else f"is not there; {self.remedy}"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "flash_attn",
            flash.attend_flash_attn,
            True,
            lambda: flash.flash_attn_function() is not None,
            "pip install flash-attn",
        ),
        Backend(
            "torch_varlen",
            flash.attend_torch_varlen,
            True,
            lambda: flash.torch_varlen_function() is not None,
            "it comes with torch 2.10 and later",
        ),
        Backend("sdpa", sdpa.attend, False, lambda: True),
    )
}


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The named backend, or for "auto" the first of `BACKENDS` that can serve."""
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.lacks(device, dtype) is None)
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; known are: auto, {', '.join(BACKENDS)}.")
    why_not = BACKENDS[name].lacks(device, dtype)
    if why_not is not None:
        raise ValueError(f"attention backend {name!r} {why_not}; or choose 'auto'.")
    return BACKENDS[name]
