"""Small updates of half-precision weights: how many are rounded away, and float32 copies that keep them.

bfloat16 holds 8 significant bits. AdamW moves a number by about the learning rate, and where that is below half the
distance to the next bfloat16, the number stays what it is, step after step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fastdpo.types import UserError

logger = logging.getLogger(__name__)

MASTER = "master_weight"  # its key in the optimizer's state
_BITS = {torch.bfloat16: 8, torch.float16: 11}  # of the significand
_SAMPLE = 1 << 16  # numbers of a parameter that are looked at, at most
_TOLD_FROM = 0.01  # the share of updates that are lost
_NOT_BY_THE_LEARNING_RATE = ("sgd", "adagrad")  # their updates are as large as the gradient


def lost_updates(parameters: Iterable[Tensor], learning_rate: float) -> tuple[float, int]:
    """How many numbers of half-precision parameters an update of `learning_rate` would not change, and how many there
    are; estimated from an even sample of each parameter."""
    lost: list[Tensor] = []
    total = 0
    for value in parameters:
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.dtype not in _BITS or not local.numel():
            continue
        flat = local.detach().reshape(-1)
        sample = flat[:: flat.numel() // _SAMPLE | 1].float()  # odd, so that all columns of a matrix come in turn
        exponent = torch.frexp(sample).exponent  # |w| = m * 2^exponent, m in [0.5, 1)
        half_ulp = torch.ldexp(torch.ones_like(sample), exponent - _BITS[local.dtype] - 1)
        lost.append(((learning_rate < half_ulp) & (sample != 0)).double().mean().cpu() * flat.numel())
        total += flat.numel()
    return (float(torch.stack(lost).sum()) if lost else 0.0), total


class LostUpdates(TrainerCallback):
    """Says at the start of training how many updates are rounded away."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        trainer = self.trainer
        if args.master_weights or trainer.is_deepspeed_enabled or optimizer is None:
            return
        if str(getattr(args.optim, "value", args.optim)).startswith(_NOT_BY_THE_LEARNING_RATE):
            return
        lost, total = 0.0, 0
        for group in optimizer.param_groups:
            here, of = lost_updates(group["params"], group.get("initial_lr", group["lr"]))
            lost, total = lost + here, total + of
        if total and lost / total >= _TOLD_FROM and trainer.is_world_process_zero():
            logger.warning(
                "about %d of %d trained half-precision numbers (%.1f%%) are so large that an update of about "
                "learning_rate=%g is below half a unit in the last place and is rounded away. Set master_weights=True "
                "to keep float32 copies, or load the model with dtype='float32' and set bf16=True.",
                round(lost), total, 100 * lost / total, args.learning_rate,
            )  # fmt: skip


@contextmanager
def kept_in_float32(trainer: Any) -> Iterator[None]:
    """Within it, an optimizer that the trainer creates steps float32 copies, if args.master_weights.

    Raises:
        UserError: there is nothing to keep, or no way to.
    """
    if not trainer.args.master_weights or trainer.optimizer is not None:
        yield
        return
    given = trainer.optimizer_cls_and_kwargs
    kind, options = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if not isinstance(kind, type) or {"optimizer_dict", "model"} & set(options):
        raise UserError(
            f"master_weights=True cannot wrap optim={trainer.args.optim!r}, which updates weights by itself; take "
            "another optim."
        )
    trainer.optimizer_cls_and_kwargs = with_master_weights(kind), options
    try:
        yield
    finally:
        trainer.optimizer_cls_and_kwargs = given


def check_master_weights(trainer: Any) -> None:
    """
    Raises:
        UserError: master_weights=True where it would do nothing.
    """
    if not trainer.args.master_weights:
        return
    if trainer.is_deepspeed_enabled:
        raise UserError("master_weights=True is what DeepSpeed does by itself; leave it out.")
    if trainer.optimizer is not None:
        raise UserError(
            "master_weights=True and optimizers contradict each other: it is for an optimizer that the trainer makes; "
            "leave one of them out."
        )
    if not any(value.requires_grad and value.dtype in _BITS for value in trainer.model.parameters()):
        raise UserError(
            "master_weights=True is for trained weights in bfloat16 or float16, and this model trains none; leave it "
            "out."
        )


def with_master_weights(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimizer class, stepping a float32 copy of each half-precision parameter, which then gets it rounded.

    The copies are part of the state, of the parameter itself, so that checkpoints hold them. All is elementwise, so
    parameters may be shards (DTensor). A parameter that was set from outside is copied anew where it differs.
    """

    class WithMasterWeights(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            masters = {}
            with torch.no_grad():
                for value in _half(self):
                    if value.grad is not None:
                        masters[value] = _master(value, self.state.get(value, {}).get(MASTER))
                        masters[value].grad = value.grad.float()
            with _in_place_of(self, masters):
                super().step()
            with torch.no_grad():
                for value, master in masters.items():
                    master.grad = None
                    value.copy_(master)
                    self.state[value][MASTER] = master
            return loss

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """torch casts state to the parameter's dtype: float32 copies stand in for those whose state is loaded."""
            numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
            values = [value for group in self.param_groups for value in group["params"]]
            masters = {}
            if len(numbers) == len(values):  # else torch says what does not fit
                masters = {
                    value: torch.empty_like(value, dtype=torch.float32)
                    for number, value in zip(numbers, values, strict=True)
                    if value.dtype in _BITS and number in state_dict["state"]
                }
            with _in_place_of(self, masters):
                super().load_state_dict(state_dict)

    WithMasterWeights.__name__ = WithMasterWeights.__qualname__ = kind.__name__
    return WithMasterWeights


def _half(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for group in optimizer.param_groups for value in group["params"] if value.dtype in _BITS]


def _master(value: Tensor, held: Tensor | None) -> Tensor:
    fresh = value.detach().float()
    return fresh if held is None else torch.where(held.to(value.dtype) == value, held, fresh)


@contextmanager
def _in_place_of(optimizer: torch.optim.Optimizer, masters: dict[Tensor, Tensor]) -> Iterator[None]:
    """Within it, the copies are the optimizer's parameters, with the state of those that they stand for."""
    for value, master in masters.items():
        state = optimizer.state.pop(value, {})
        own = {name: each for name, each in state.items() if name != MASTER}
        if own:
            optimizer.state[master] = own
    lists = [group["params"] for group in optimizer.param_groups]
    for group, values in zip(optimizer.param_groups, lists, strict=True):
        group["params"] = [masters.get(value, value) for value in values]
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = values
        for value, master in masters.items():
            optimizer.state[value] = optimizer.state.pop(master, {})
