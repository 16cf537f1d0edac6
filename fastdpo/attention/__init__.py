"""Attention over packed rows, registered with transformers under the name "fastdpo"."""

from fastdpo.attention.contract import Backend, Needs
from fastdpo.attention.interface import (
    ATTENTION_NAME,
    attention_of,
    packed_forward,
    packed_layers,
    register,
    restore_attention,
    set_attention,
)
from fastdpo.attention.select import BACKENDS, select_backend

__all__ = [
    "ATTENTION_NAME",
    "BACKENDS",
    "Backend",
    "Needs",
    "attention_of",
    "packed_forward",
    "packed_layers",
    "register",
    "restore_attention",
    "select_backend",
    "set_attention",
]
