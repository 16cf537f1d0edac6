"""The policy while it is trained or evaluated: what is put on it for that is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastdpo.attention import attention_of, restore_attention, set_attention
from fastdpo.models import restore_forward
from fastdpo.trainer.neftune import EmbeddingNoise

# What transformers and accelerate leave on modules: of checkpointed activations, and that the model was prepared.
_MARKS = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hooks",
    "_require_grads_hook",
    "_is_accelerate_prepared",
)


class LentModel:
    """The policy of a trainer, `model` as it was passed and `inner` the transformers model in it.

    `lent()` is the context in which the trainer may do with it what it needs: extend its forward (`extend`), wrap that
    in autocast, checkpoint activations, switch attention and training mode. Afterwards the model computes what it did
    before, under the same calls. It may be entered again within.
    """

    def __init__(
        self, model: Any, inner: Any, extend: Callable[[Any], None], noise: EmbeddingNoise | None,
        packed: Sequence[Any], *, sharded: bool,
    ) -> None:  # fmt: skip
        """
        packed   transformers models that are going to run packed: they have packed attention the whole time
        sharded  the model is taken over by what shards it, and its forward is not given back
        """
        self.model, self.inner, self._extend, self._noise, self._sharded = model, inner, extend, noise, sharded
        self._packed = packed
        self._depth = 0

    @contextmanager
    def lent(self) -> Iterator[None]:
        self._extend(self.inner)
        if self._depth:
            yield
            return
        self._depth += 1
        try:
            with nullcontext() if self._noise is None else self._noise.on(self.inner), self._given_back():
                yield
        finally:
            self._depth -= 1

    @contextmanager
    def _given_back(self) -> Iterator[None]:
        if self._sharded:
            yield
            return
        attention = [of for model in {id(model): model for model in (self.inner, *self._packed)}.values()
                     for of in attention_of(model)]  # fmt: skip
        training = {module: module.training for module in self.model.modules()}
        marks = {
            (module, name): module.__dict__[name]
            for module in self.model.modules()
            for name in _MARKS
            if name in module.__dict__
        }
        hooks = getattr(self.inner, "_require_grads_hooks", None)
        for model in self._packed:
            set_attention(model)
        try:
            yield
        finally:
            without_autocast(self.model)
            without_autocast(self.inner)
            restore_forward(self.inner)
            restore_attention(attention)
            if getattr(self.inner, "_require_grads_hooks", None) and not hooks:
                self.inner.disable_input_require_grads()
            for module in self.model.modules():
                module.training = training.get(module, False)
                for name in _MARKS:
                    if (module, name) in marks:
                        module.__dict__[name] = marks[module, name]
                    else:
                        module.__dict__.pop(name, None)


def without_autocast(model: torch.nn.Module) -> None:
    """Takes off the autocast that accelerate has put around the forward of a model.

    It would also act on calls that have nothing to do with the run that asked for it. In a run `compute_loss` casts.
    """
    before = model.__dict__.pop("_original_forward", None)
    if before is None:
        return
    if getattr(before, "__func__", None) is type(model).forward:
        model.__dict__.pop("forward", None)
    else:
        model.forward = before
