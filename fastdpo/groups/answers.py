"""Single answers, each desirable or not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.groups.base import GroupInputs, Groups
from fastdpo.groups.checks import check_desirable, check_vector, kl_estimate, reference
from fastdpo.losses import AnswerTerms, WeightedLosses
from fastdpo.types import LossOutput, TokenMetrics, accumulation_dtype


class Answers(Groups):
    """Sequence i is answer i."""

    what = "answers"

    def __init__(self, losses: WeightedLosses, inputs: GroupInputs, lengths: Tensor | None, like: Tensor) -> None:
        """`like` and the references are those of the answers alone; `kl` is known where the loss needs it."""
        self.losses, self.count, self.dtype = losses, like.shape[0], like.dtype
        self.weights = check_vector("pair_weights", inputs.pair_weights, self.count, like, "answers")
        self.refs = reference(inputs.ref_logps, losses, like)
        self.desirable = check_desirable(inputs.desirable, self.count, like)
        assert not callable(inputs.kl)  # called already
        self.kl = None if inputs.kl is None else kl_estimate(inputs.kl, like)
        self.lengths = None if lengths is None else lengths.to(like.dtype)
        self.divergence, self.grad_dtype = losses.divergence, inputs.grad_dtype

    @property
    def slots_per_group(self) -> tuple[int, ...]:
        return (1,) * self.count

    def group_ids(self, sequence_ids: Tensor) -> Tensor:
        return sequence_ids

    def rejected(self) -> Tensor:
        return ~self.desirable

    def _terms(self, first: int, end: int, sums: Tensor) -> AnswerTerms:
        part = slice(first, end)
        return AnswerTerms(
            sums,
            self.refs[part],
            self.desirable[part],
            self.kl,
            None if self.lengths is None else self.lengths[part],
            self.divergence,
        )

    def __call__(self, first: int, end: int, sums: Tensor, sums_p2: Tensor | None = None) -> Tensor:
        return self.weighted(self.losses(self._terms(first, end, self.bounded(sums.to(self.dtype)))), first, end)

    def output(self, losses: Tensor, loss: Tensor, sums: Tensor, tokens: TokenMetrics | None) -> LossOutput:
        """Chosen are the desirable answers, rejected the others; each NaN where the answer is of the other kind."""
        logps = sums.detach().to(self.dtype)
        rewards = self.losses.beta * (logps - self.refs)

        def split(values: Tensor) -> tuple[Tensor, Tensor]:
            return values.where(self.desirable, torch.nan), values.where(~self.desirable, torch.nan)

        kl = self.kl if self.losses.needs_kl else None
        return LossOutput(loss, losses, *split(logps), *split(rewards), tokens=tokens, kl=kl, paired=False)


def mismatched_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """mean(logps - ref_logps) of answers to other prompts, KTO's estimate of KL(pi || pi_ref), without gradient."""
    dtype = accumulation_dtype(logps.dtype)
    return (logps.to(dtype) - ref_logps.to(dtype)).mean().detach()
