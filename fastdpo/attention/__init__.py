"""Attention over packed rows, registered with transformers under the name "fastdpo"."""

from fastdpo.attention.contract import Backend, Needs
from fastdpo.attention.interface import ATTENTION_NAME, count_packed_layers, packed_forward, register
from fastdpo.attention.select import BACKENDS, select_backend

__all__ = [
    "ATTENTION_NAME",
    "BACKENDS",
    "Backend",
    "Needs",
    "count_packed_layers",
    "packed_forward",
    "register",
    "select_backend",
]
