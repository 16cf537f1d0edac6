"""Which attention backend serves a call."""

from __future__ import annotations

from fastdpo.attention import flash, flex, sdpa
from fastdpo.attention.contract import Backend, Needs

BACKENDS = {backend.name: backend for backend in (flash.FLASH_ATTN, flash.TORCH_VARLEN, flex.FLEX, sdpa.SDPA)}


def select_backend(name: str, needs: Needs) -> Backend:
    """The named backend, or for "auto" the first that serves of `BACKENDS`; FlexAttention only for softcap and sinks.

    Raises:
        ValueError: the named one is unknown, not installed, or cannot do what is needed; it says what to install.
    """
    if name == "auto":
        names = (each for each in BACKENDS if each != "flex" or needs.softcap or needs.sinks)
        return next(BACKENDS[each] for each in names if BACKENDS[each].lacks(needs) is None)
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; known are: auto, {', '.join(BACKENDS)}.")
    why_not = BACKENDS[name].lacks(needs)
    if why_not is not None:
        raise ValueError(f"attention backend {name!r} {why_not}; or choose 'auto'.")
    return BACKENDS[name]
