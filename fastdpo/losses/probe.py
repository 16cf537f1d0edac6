"""A loss of the user's, tried out before it is registered: what would fail in step 1,000 fails here."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdpo.losses.terms import AnswerTerms, ListTerms, PairTerms, Terms

if TYPE_CHECKING:
    from fastdpo.losses.registry import LossSpec

BATCH = 5


def loss_problem(spec: LossSpec) -> str | None:
    """What is wrong with the loss on a drawn batch, or None."""
    terms, leaves = drawn_terms(spec)
    try:
        with torch.enable_grad():
            losses = spec.fn(terms, beta=0.3, **spec.options)
    except Exception as error:
        return f"on a drawn batch it raises {type(error).__name__}: {error}"
    if not isinstance(losses, Tensor) or losses.shape != (BATCH,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        return f"it gives {got} for a batch of {BATCH}; it must give ({BATCH},), one loss each."
    if not losses.isfinite().all():
        return f"on ordinary log-probs it gives {losses.tolist()}; every loss must be a finite number."
    if not losses.requires_grad:
        return "no gradient reaches the log-probs; build it of differentiable PyTorch operations, without detach."
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    if all(grad is None for grad in grads):
        return "no gradient reaches the log-probs; build it of differentiable PyTorch operations, without detach."
    for leaf, grad in zip(leaves, grads, strict=True):
        if grad is not None and not grad.isfinite().all():
            return f"its gradient at log-probs {leaf.tolist()} is {grad.tolist()}; it must be finite."
    if spec.per_pair:
        try:
            with torch.no_grad():
                each = [spec.fn(_part(terms, i), beta=0.3, **spec.options) for i in range(BATCH)]
        except Exception as error:
            return f"on a single pair it raises {type(error).__name__}: {error}; or register it with per_pair=False."
        if any(one.shape != (1,) for one in each):
            return f"it gives {tuple(each[0].shape)} for a single pair; it must give (1,)."
        alone = torch.cat(each)
        if not torch.allclose(alone, losses.detach(), rtol=1e-4, atol=1e-5):
            return (
                "the loss of one pair depends on the others of the batch; register it with per_pair=False (it then "
                "needs the whole batch in one pass)."
            )
    return None


def drawn_terms(spec: LossSpec) -> tuple[Terms, list[Tensor]]:
    """Terms as `spec` takes them, and the tensors in them that stand for the policy."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 3 - 12

    def lengths(*shape: int) -> Tensor | None:
        return torch.randint(3, 20, shape, generator=generator).float() if spec.needs_lengths else None

    if spec.data == "lists":
        logps = draw(BATCH, 3).requires_grad_()
        valid = torch.tensor([[True, True, True]] * (BATCH - 1) + [[True, True, False]])
        lists = ListTerms(torch.where(valid, logps, 0), torch.where(valid, draw(BATCH, 3), 0), valid, lengths(BATCH, 3))
        return lists, [logps]
    if spec.data == "answers":
        logps, desirable = draw(BATCH).requires_grad_(), torch.arange(BATCH) % 2 == 0
        kl = torch.tensor(0.5) if spec.needs_kl else None
        return AnswerTerms(logps, draw(BATCH), desirable, kl, lengths(BATCH)), [logps]
    chosen, rejected = draw(BATCH).requires_grad_(), draw(BATCH).requires_grad_()
    refs = (draw(BATCH), draw(BATCH)) if spec.needs_reference else (torch.zeros(BATCH), torch.zeros(BATCH))
    mean = torch.tensor(10.0) if spec.needs_lengths else None
    return PairTerms(chosen, rejected, *refs, lengths(BATCH), lengths(BATCH), mean), [chosen, rejected]


def _part(terms: Terms, i: int) -> Terms:
    """The terms of one pair, list or answer."""
    parts: dict[str, Any] = {
        field.name: value[i : i + 1]
        for field in fields(terms)
        if isinstance(value := getattr(terms, field.name), Tensor) and value.dim()
    }
    return replace(terms, **parts)
