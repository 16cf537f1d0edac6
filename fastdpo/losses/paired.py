"""Losses on pairs with a reference. Each maps PairTerms to (B,) losses; delta is the difference of the log-ratios."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.terms import PairTerms


def sigmoid(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) * logsigmoid(beta * delta) - eps * logsigmoid(-beta * delta)

    eps = 0 is DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); eps > 0, the share of pairs whose preference is
    taken to be flipped, is conservative DPO (Mitchell 2023).
    """
    return _log_loss(beta * terms.delta, label_smoothing)


def _log_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses


def hinge(terms: PairTerms, *, beta: float) -> Tensor:
    """max(0, 1 - beta * delta)   (Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657)"""
    return torch.relu(1 - beta * terms.delta)


def ipo(terms: PairTerms, *, beta: float) -> Tensor:
    """(chosen_logratio / L_c - rejected_logratio / L_r - 1 / (2 * beta))^2, L the completion lengths in tokens.

    Azar et al. 2023, arXiv:2310.12036, eq. 17, where beta is called tau; the mean over tokens in place of the sum is
    how its authors run it.
    """
    assert terms.chosen_lengths is not None and terms.rejected_lengths is not None
    chosen = terms.chosen_logratios / terms.chosen_lengths.clamp(min=1)
    rejected = terms.rejected_logratios / terms.rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def aot(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The form of `sigmoid` on sort(logp_c - logp_r) - sort(ref_c - ref_r), both sorted over the batch.

    Melnyk et al. 2024, arXiv:2406.05882, on paired data. An entry of the result belongs to a rank, not to a pair.
    """
    policy = (terms.chosen_logps - terms.rejected_logps).sort().values
    reference = (terms.ref_chosen_logps - terms.ref_rejected_logps).sort().values
    return _log_loss(beta * (policy - reference), label_smoothing)


def aot_unpaired(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The form of `sigmoid` on sort(logp_c - ref_c) - sort(logp_r - ref_r), both sorted over the batch.

    Melnyk et al. 2024, arXiv:2406.05882, on unpaired data. An entry of the result belongs to a rank, not to a pair.
    """
    delta = terms.chosen_logratios.sort().values - terms.rejected_logratios.sort().values
    return _log_loss(beta * delta, label_smoothing)
