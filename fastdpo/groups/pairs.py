"""Pairs of a chosen and a rejected answer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.groups.base import GroupInputs, Groups
from fastdpo.groups.checks import check_vector, reference
from fastdpo.losses import PairTerms, WeightedLosses
from fastdpo.losses.terms import mean_length, nonzero
from fastdpo.ops import sum_by_id
from fastdpo.types import LossOutput, TokenMetrics


class Pairs(Groups):
    """Chosen i is sequence i, rejected i is B + i."""

    what = "pairs"

    def __init__(self, losses: WeightedLosses, inputs: GroupInputs, lengths: Tensor | None, like: Tensor) -> None:
        """`lengths` (2B,) or None; `like`: a (2B,) tensor of the log-probs' dtype and device."""
        self.losses, self.count, self.dtype = losses, like.shape[0] // 2, like.dtype
        self.weights = check_vector("pair_weights", inputs.pair_weights, self.count, like, "pairs")
        self.margins = check_vector("margins", inputs.margins, self.count, like, "pairs")
        self.refs = reference(inputs.ref_logps, losses, like).view(2, -1)
        self.divergence, self.grad_dtype = losses.divergence, inputs.grad_dtype
        self.lengths = None if lengths is None else lengths.to(like.dtype)
        self.mean_chosen_length = None
        if isinstance(inputs.mean_chosen_length, Tensor):
            self.mean_chosen_length = nonzero(inputs.mean_chosen_length.to(like.dtype))
        elif inputs.mean_chosen_length is not None:
            self.mean_chosen_length = torch.full_like(like[0], inputs.mean_chosen_length or 1.0)
        elif self.lengths is not None:
            self.mean_chosen_length = mean_length(self.lengths[: self.count], self.weights)

    @property
    def _slots(self) -> int:
        """Of one sequence."""
        return 1 if self.losses.ld_alpha is None else 2

    @property
    def slots_per_group(self) -> tuple[int, ...]:
        return (2 * self._slots,) * self.count

    def slot_ids(self, sequence_ids: Tensor, counted: Tensor) -> Tensor:
        slots = 2 * self.group_ids(sequence_ids) + (sequence_ids >= self.count)
        if self.losses.ld_alpha is None:
            return slots
        assert self.lengths is not None  # there wherever there are tokens
        return 2 * slots + beyond_shorter(sequence_ids, counted, self.lengths)

    def group_ids(self, sequence_ids: Tensor) -> Tensor:
        return sequence_ids.remainder(self.count)

    def rejected(self) -> Tensor:
        return torch.arange(2 * self.count, device=self.refs.device) >= self.count

    def __call__(self, first: int, end: int, sums: Tensor, sums_p2: Tensor | None = None) -> Tensor:
        parts = self.bounded(sums).view(-1, 2, self._slots)
        pair_terms = self._terms(first, end, *self._logps(parts))
        plain = (
            None if self.losses.ld_alpha is None else self._terms(first, end, *parts.sum(2).to(self.dtype).unbind(1))
        )
        policy_weights = None
        if self.losses.use_weighting:
            assert sums_p2 is not None and self.lengths is not None  # there wherever there are tokens
            lengths = self.lengths.view(2, -1)[:, first:end].clamp(min=1)
            aligned = (parts.detach() - sums_p2.view_as(parts)).sum(2) / lengths.T  # (pairs, 2)
            policy_weights = aligned.sum(1).exp().to(self.dtype)
        return self.weighted(self.losses(pair_terms, plain, policy_weights), first, end)

    def _logps(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """(pairs, 2, slots) -> chosen, rejected."""
        alpha = self.losses.ld_alpha
        sums = parts[..., 0] if alpha is None else parts[..., 0] + alpha * parts[..., 1]
        chosen, rejected = sums.to(self.dtype).unbind(1)
        return chosen, rejected

    def _terms(self, first: int, end: int, chosen: Tensor, rejected: Tensor) -> PairTerms:
        part = slice(first, end)
        lengths = None if self.lengths is None else self.lengths.view(2, -1)[:, part]
        return PairTerms(
            chosen,
            rejected,
            self.refs[0, part],
            self.refs[1, part],
            None if lengths is None else lengths[0],
            None if lengths is None else lengths[1],
            self.mean_chosen_length,
            None if self.margins is None else self.margins[part],
            self.divergence,
        )

    def output(self, losses: Tensor, loss: Tensor, sums: Tensor, tokens: TokenMetrics | None) -> LossOutput:
        chosen, rejected = self._logps(sums.detach().view(-1, 2, self._slots))
        terms = self._terms(0, self.count, chosen, rejected)
        beta = 1.0 if self.losses.data == "scores" else self.losses.beta
        own = self.losses.own_rewards(terms)
        if own is not None:
            rewards = own
        elif self.losses.mean_rewards:
            rewards = beta * terms.chosen_mean_logps, beta * terms.rejected_mean_logps
        else:
            rewards = beta * terms.chosen_scores, beta * terms.rejected_scores
        return LossOutput(loss, losses, chosen, rejected, *rewards, tokens=tokens, extras=self.losses.extras(terms))


def places_in_sequence(sequence_ids: Tensor, counted: Tensor, num_sequences: int) -> Tensor:
    """(N,) how many targets of the same sequence stand before each row; rows of a sequence come in its order."""
    ids = torch.where(counted, sequence_ids, num_sequences)  # the rest in a group of its own
    order = ids.argsort(stable=True)
    counts = torch.zeros(num_sequences + 1, dtype=torch.long, device=ids.device).index_add_(
        0, ids, torch.ones_like(ids)
    )
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(ids), device=ids.device) - starts[ids[order]]
    return torch.empty_like(places).index_copy_(0, order, places)


def beyond_shorter(sequence_ids: Tensor, counted: Tensor, lengths: Tensor) -> Tensor:
    """(N,) bool: the tokens of pairs that the shorter answer of the pair, `lengths` (2B,), has none for."""
    shared = lengths.view(2, -1).min(dim=0).values
    places = places_in_sequence(sequence_ids, counted, len(lengths))
    return places >= shared[sequence_ids.remainder(len(shared))]


def length_desensitized(logps: Tensor, sequence_ids: Tensor, num_sequences: int, alpha: float) -> Tensor:
    """(S,) sums of pairs' log-probs (N,), tokens beyond the length of the pair's shorter answer times `alpha` (LD-DPO).

    Added up as the loss adds them, so that policy and reference are the same where they are.
    """
    counted = torch.ones_like(sequence_ids, dtype=torch.bool)
    lengths = torch.zeros(num_sequences, dtype=torch.long, device=logps.device)
    lengths.index_add_(0, sequence_ids, torch.ones_like(sequence_ids))
    tail = beyond_shorter(sequence_ids, counted, lengths)
    parts = sum_by_id(logps, 2 * sequence_ids + tail, 2 * num_sequences).view(-1, 2)
    return (parts[:, 0] + alpha * parts[:, 1]).to(logps.dtype)
