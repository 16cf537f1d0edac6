"""Losses on single answers that are desirable or not. Each maps AnswerTerms to (B,) losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.terms import AnswerTerms


def kto(terms: AnswerTerms, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """w_d * (1 - sigmoid(beta (Delta - kl))) if desirable, else w_u * (1 - sigmoid(beta (kl - Delta)))

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7; kl = max(0, mean of Delta over answers to other prompts), without
    gradient.
    """
    assert terms.kl is not None, "the registry row of a loss with a KL estimate says needs_kl"
    return _prospect(terms, beta * (terms.logratios - terms.kl), desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    terms: AnswerTerms, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """w_d * (1 - sigmoid(beta Delta)) if desirable, else w_u * sigmoid(beta Delta)

    `apo_zero` (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7) answer by answer.
    """
    return _prospect(terms, beta * terms.logratios, desirable_weight, undesirable_weight)


def _prospect(terms: AnswerTerms, gains: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    good = desirable_weight * torch.sigmoid(-gains)
    return torch.where(terms.desirable, good, undesirable_weight * torch.sigmoid(gains))
