"""What must hold of the tensors that come beside the tokens; every ValueError says what is wrong and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fastdpo.groups.base import GroupInputs, RefLogps
from fastdpo.losses import WeightedLosses
from fastdpo.ops.library import is_batched

REDUCTIONS = ("mean", "sum", "none")


def check_inputs(losses: WeightedLosses, inputs: GroupInputs) -> None:
    """That what is given goes with the data that the losses are a function of.

    Raises:
        ValueError: something is missing, or given without a meaning.
    """
    wanted = {"list_sizes": "lists", "desirable": "answers"}
    for name, data in wanted.items():
        if losses.data == data and getattr(inputs, name) is None:
            raise ValueError(f"{name} is missing, and loss_type {losses.names} is a loss of {data}; give {name}.")
    known = {
        "list_sizes": losses.data == "lists",
        "desirable": losses.data == "answers",
        "kl": losses.needs_kl,
        "margins": losses.data == "scores",
        "mean_chosen_length": losses.data == "pairs",
    }
    for name, has_meaning in known.items():
        if getattr(inputs, name) is not None and not has_meaning:
            raise ValueError(f"{name} has no meaning for loss_type {losses.names}; leave it out.")
    mean = inputs.mean_chosen_length
    if mean is not None and not isinstance(mean, Tensor) and not 0 <= mean < math.inf:
        raise ValueError(f"mean_chosen_length is {mean}; it must be a number of tokens, from 0.")
    if inputs.ref_logps is not None and losses.data == "scores":
        raise ValueError(f"ref_logps has no meaning for loss_type {losses.names}, which compares scores; leave it out.")
    if inputs.ref_logps is not None and not isinstance(inputs.ref_logps, Tensor) and losses.data != "pairs":
        raise ValueError(
            f"ref_logps is a pair of tensors, and {losses.data} have no chosen and rejected; give one tensor."
        )
    if inputs.pair_weights is not None and not losses.per_pair:
        raise ValueError(
            f"pair_weights has no meaning for loss_type {losses.names}, which compares the pairs of a whole batch; "
            "leave it out."
        )
    if inputs.ref_logps is not None and losses.reference_free:
        raise ValueError("reference_free=True and ref_logps contradict each other; leave one of them out.")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(map(repr, REDUCTIONS))}.")


def reference(ref_logps: RefLogps, losses: WeightedLosses, like: Tensor) -> Tensor:
    """The reference's sums, detached, in the shape, dtype and on the device of `like`; zeros where none are given."""
    if ref_logps is None:
        if losses.needs_reference:
            raise ValueError(f"ref_logps is missing, and loss_type {losses.names} needs the reference's log-probs.")
        return torch.zeros_like(like)
    if not isinstance(ref_logps, Tensor):
        half = like.shape[0] // 2
        for tensor in ref_logps:
            if tensor.device != like.device:
                raise ValueError(
                    f"ref_logps is on {tensor.device} and the log-probs on {like.device}; move ref_logps there."
                )
        for name, tensor in zip(("chosen", "rejected"), ref_logps, strict=True):
            if tuple(tensor.shape) != (half,):
                raise ValueError(
                    f"ref_logps, {name} part, has shape {tuple(tensor.shape)}; {half} pairs need ({half},)."
                )
        ref_logps = torch.cat([part.to(like.dtype) for part in ref_logps])
    if tuple(ref_logps.shape) != tuple(like.shape):
        raise ValueError(
            f"ref_logps has shape {tuple(ref_logps.shape)}; it must be {tuple(like.shape)}: one sum a sequence"
            + (", chosen first." if losses.data == "pairs" else ".")
        )
    if ref_logps.device != like.device:
        raise ValueError(
            f"ref_logps is on {ref_logps.device} and the log-probs on {like.device}; move ref_logps there."
        )
    ref_logps = ref_logps.detach().to(like.dtype)
    check_finite("ref_logps", ref_logps)
    return ref_logps


def known_on_host(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_batched(tensor)


_looked_at = ContextVar("looked_at", default=False)


@contextmanager
def looked_at() -> Iterator[None]:
    """Within it `check_finite`, and the check of labels, are silent: rows have been looked at, the rest is of models.

    A run reports a model that has become non-finite by the loss, with step and rows.
    """
    before = _looked_at.set(True)
    try:
        yield
    finally:
        _looked_at.reset(before)


def were_looked_at() -> bool:
    return _looked_at.get()


def check_finite(name: str, values: Tensor) -> None:
    """On a CPU only: a GPU would have to be waited for (there, PreferenceCollator has looked at what rows carry)."""
    if not known_on_host(values) or were_looked_at():
        return
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        place = bad[0].tolist()
        raise ValueError(
            f"{name} is {values[tuple(place)].item()} at {place[0] if len(place) == 1 else place} and at "
            f"{len(bad) - 1} more places; every value must be a finite number."
        )


def check_vector(name: str, values: Tensor | None, count: int, like: Tensor, what: str) -> Tensor | None:
    """(count,) in the dtype of `like`, detached."""
    if values is None:
        return None
    if tuple(values.shape) != (count,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}; {count} {what} need ({count},).")
    if values.device != like.device:
        raise ValueError(f"{name} is on {values.device} and the log-probs on {like.device}; move {name} there.")
    check_finite(name, values)
    if name == "pair_weights" and known_on_host(values) and bool((values < 0).any()):
        raise ValueError(f"pair_weights has {values.min().item()}; a weight must not be below 0.")
    return values.detach().to(like.dtype)


def check_desirable(desirable: Tensor | None, count: int, like: Tensor) -> Tensor:
    assert desirable is not None
    if tuple(desirable.shape) != (count,) or desirable.dtype != torch.bool:
        raise ValueError(
            f"desirable has shape {tuple(desirable.shape)} and dtype {desirable.dtype}; it must be ({count},), "
            "torch.bool: whether each answer is desirable."
        )
    if desirable.device != like.device:
        raise ValueError(
            f"desirable is on {desirable.device} and the log-probs on {like.device}; move desirable there."
        )
    return desirable


def check_kl(kl: Tensor | float | Callable[[Tensor], Tensor] | None) -> None:
    """Of an estimate that the user gives: one made from the policy's log-probs is what the policy is."""
    if kl is None or callable(kl) or (isinstance(kl, Tensor) and not known_on_host(kl)):
        return
    if not bool(torch.as_tensor(kl).isfinite().all()):
        raise ValueError(f"kl is {float(kl)}; it must be a finite number, the mean over the batch.")


def kl_estimate(kl: Tensor | float, like: Tensor) -> Tensor:
    """max(0, kl), a scalar without gradient; NaN where kl is not finite, for a maximum would hide -inf."""
    if isinstance(kl, Tensor):
        if kl.device != like.device and kl.device.type != "cpu":
            raise ValueError(f"kl is on {kl.device} and the log-probs on {like.device}; move kl there.")
        value = kl.detach().to(like.device, like.dtype)
    else:
        value = torch.full((), float(kl), dtype=like.dtype, device=like.device)
    if value.dim():
        raise ValueError(f"kl has shape {tuple(value.shape)}; it must be one number, the mean over the batch.")
    return torch.where(value.isfinite(), value, torch.nan).clamp(min=0)


def check_lengths(name: str, lengths: Tensor) -> None:
    """Completion tokens: numbers from 0 (looked at on a CPU only)."""
    check_finite(name, lengths)
    if known_on_host(lengths) and bool((lengths < 0).any()):
        raise ValueError(f"{name} has {lengths.min().item()}; an answer has 0 tokens or more.")
