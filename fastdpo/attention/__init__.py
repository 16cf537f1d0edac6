"""Attention over packed rows, registered with transformers under the name "fastdpo"."""

from fastdpo.attention.contract import Backend, Needs
from fastdpo.attention.interface import ATTENTION_NAME, packed_forward, packed_layers, register
from fastdpo.attention.select import BACKENDS, select_backend

__all__ = [
    "ATTENTION_NAME",
    "BACKENDS",
    "Backend",
    "Needs",
    "packed_forward",
    "packed_layers",
    "register",
    "select_backend",
]
