"""What a loss is a function of: sums of log-probs, one for each answer, in the arrangement that the data have."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdpo.losses.divergence import REVERSE_KL, Divergence


@dataclass(frozen=True)
class PairTerms:
    """Of B pairs; every tensor is (B,), in float32 or float64.

    chosen_logps, rejected_logps          sums of log-probs over the completion (for a reward model: its scores)
    ref_chosen_logps, ref_rejected_logps  the same under the reference; zeros where there is none
    chosen_lengths, rejected_lengths      completion tokens; there where the loss asks for lengths
    mean_chosen_length                    scalar: mean tokens of the batch's chosen completions, by their pairs' weights
    margins                               by how much chosen should win; there where they were given
    divergence                            what makes scores of log-ratios
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    mean_chosen_length: Tensor | None = None
    margins: Tensor | None = None
    divergence: Divergence = REVERSE_KL

    @property
    def chosen_logratios(self) -> Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x)"""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x)"""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def chosen_scores(self) -> Tensor:
        """The chosen log-ratios after the f-divergence; the log-ratios themselves with reverse_kl."""
        return self.divergence(self.chosen_logratios)

    @property
    def rejected_scores(self) -> Tensor:
        return self.divergence(self.rejected_logratios)

    @property
    def delta(self) -> Tensor:
        """The difference of the two scores, chosen minus rejected."""
        return self.chosen_scores - self.rejected_scores

    @property
    def chosen_mean_logps(self) -> Tensor:
        """chosen_logps / L_c, the mean over tokens."""
        return self.per_token(self.chosen_logps, self.chosen_lengths)

    @property
    def rejected_mean_logps(self) -> Tensor:
        return self.per_token(self.rejected_logps, self.rejected_lengths)

    @staticmethod
    def per_token(values: Tensor, lengths: Tensor | None) -> Tensor:
        assert lengths is not None, "the registry row of a loss that divides by lengths says needs_lengths"
        return values / lengths.clamp(min=1)

    @property
    def chosen_nll(self) -> Tensor:
        """-chosen_logps / mean_chosen_length: its mean over the batch is the mean over the chosen answers' tokens."""
        assert self.mean_chosen_length is not None, "the registry row of a loss with an NLL says needs_lengths"
        return -self.chosen_logps / self.mean_chosen_length

    def with_divergence(self, divergence: Divergence) -> PairTerms:
        return replace(self, divergence=divergence)


@dataclass(frozen=True)
class ListTerms:
    """Of B prompts with up to K completions each, best first; every tensor is (B, K).

    valid    True where a prompt has so many completions; behind them `logps` and `ref_logps` are 0
    lengths  completion tokens; there where the loss asks for them
    """

    logps: Tensor
    ref_logps: Tensor
    valid: Tensor
    lengths: Tensor | None = None
    divergence: Divergence = REVERSE_KL

    @property
    def logratios(self) -> Tensor:
        """log pi(y_k|x) - log pi_ref(y_k|x)"""
        return self.logps - self.ref_logps

    @property
    def scores(self) -> Tensor:
        """The log-ratios after the f-divergence."""
        return self.divergence(self.logratios)

    def with_divergence(self, divergence: Divergence) -> ListTerms:
        return replace(self, divergence=divergence)


@dataclass(frozen=True)
class AnswerTerms:
    """Of B single answers, each desirable or not; every tensor is (B,).

    kl  scalar, without gradient and not below 0: the estimate of KL(pi || pi_ref); there where the loss needs it
    """

    logps: Tensor
    ref_logps: Tensor
    desirable: Tensor
    kl: Tensor | None = None
    lengths: Tensor | None = None
    divergence: Divergence = REVERSE_KL

    @property
    def logratios(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x)"""
        return self.logps - self.ref_logps

    def with_divergence(self, divergence: Divergence) -> AnswerTerms:
        return replace(self, divergence=divergence)


Terms = PairTerms | ListTerms | AnswerTerms


def mean_length(lengths: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_i w_i L_i / sum_i w_i, to divide by."""
    return nonzero(lengths.mean() if weights is None else (weights * lengths).sum() / nonzero(weights.sum()))


def nonzero(total: Tensor) -> Tensor:
    """To divide by: 1 in place of 0, where nothing weighs anything, or no answer has a token."""
    return torch.where(total == 0, torch.ones_like(total), total)
