"""Where PEFT's adapters are in a model, whatever their kind: told by the modules that PEFT has put in, not by names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

# What of a wrapper is the module that it stands for.
_WRAPPED = ("base_layer", "original_module", "token_adapter")


def adapter_wrappers(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules that PEFT has put in the place of the model's own."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield name, module


def place(name: str, wrappers: Mapping[str, Any]) -> tuple[str, Any, list[str]]:
    """The name that a tensor has without adapters; or that of its layer, the wrapper it is of, and its place there."""
    parts, plain = name.split("."), []
    for number, part in enumerate(parts):
        wrapper = wrappers.get(".".join(parts[:number]))
        if wrapper is None:
            plain.append(part)
        elif part not in _WRAPPED:
            return ".".join(plain), wrapper, parts[number:]
    return ".".join(plain), None, []


def adapter_tensors(model: Any) -> Iterator[tuple[str, Any, list[str], Tensor]]:
    """(name, wrapper, place in it, tensor) of all parameters and buffers of adapters, whether they are in use or not;
    a tensor that stands in several places once for each."""
    wrappers = dict(adapter_wrappers(model))
    if not wrappers:
        return
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            _, wrapper, inside = place(name, wrappers)
            if wrapper is not None:
                yield name, wrapper, inside, tensor


def trained_outside_adapters(model: Any) -> list[str]:
    """Names of the trainable parameters that remain in a PEFT model where its adapters are switched off."""
    inner = model.get_base_model()  # beyond it are parameters that adapters share
    wrappers = dict(adapter_wrappers(inner))
    outside: dict[int, str] = {}
    inside: set[int] = set()
    for name, value in inner.named_parameters(remove_duplicate=False):
        if place(name, wrappers)[1] is not None:
            inside.add(id(value))
        elif value.requires_grad:
            outside.setdefault(id(value), name)
    return [name for key, name in outside.items() if key not in inside]


def adapters_in_use(model: Any) -> frozenset[str]:
    """Names of the adapters that are switched on; one with another config counts as another."""
    wrapper = next((module for _, module in adapter_wrappers(model)), None)
    if wrapper is None or wrapper.disable_adapters:
        return frozenset()
    configs = getattr(model, "peft_config", {})
    return frozenset(f"{name} {id(configs.get(name))}" for name in wrapper.active_adapters)
