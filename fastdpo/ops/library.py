"""Definition of the operators in torch.library: opaque to torch.compile, transparent to the FLOP counter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_OPERATORS: list[tuple[Any, Callable[..., Any]]] = []
_seen = False


def define(name: str, function: Callable[..., Any], *, mutates: tuple[str, ...] = ()) -> Any:
    """The operator fastdpo::<name> with `function` as its implementation on every device."""
    operator = torch.library.custom_op(f"fastdpo::{name}", function, mutates_args=mutates)
    _OPERATORS.append((operator, function))
    return operator


def see_products() -> None:
    """Lets `torch.utils.flop_counter.FlopCounterMode` count the products inside the operators, not a formula of ours.

    It has to be called before an operator is. Until someone imports that module there is nothing to do; importing it
    here would bring triton along.
    """
    global _seen
    if torch.compiler.is_compiling() or _seen:  # in this order, or a compiled graph would depend on what was seen
        return
    counter = sys.modules.get("torch.utils.flop_counter")
    mode_class = getattr(counter, "_FlopCounterMode", None)
    if mode_class is None:
        return
    _seen = True
    for operator, function in _OPERATORS:
        torch.library.register_torch_dispatch(operator, mode_class, _counted(function))


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def rule(mode: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with mode:
            return function(*args, **kwargs)

    return rule
