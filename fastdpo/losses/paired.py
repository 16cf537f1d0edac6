"""Losses on pairs with a reference. Each maps PairTerms to (B,) losses.

delta = s(Delta_c) - s(Delta_r), where Delta = logp - ref_logp and s is an f-divergence's score, by default Delta.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.terms import PairTerms


def sigmoid(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) * logsigmoid(beta * delta) - eps * logsigmoid(-beta * delta)

    eps = 0 is DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); eps > 0, the share of pairs whose preference is
    taken to be flipped, is conservative DPO (Mitchell 2023).
    """
    return smoothed_log_loss(beta * terms.delta, label_smoothing)


def smoothed_log_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) * logsigmoid(logits) - eps * logsigmoid(-logits)"""
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses


def hinge(terms: PairTerms, *, beta: float) -> Tensor:
    """max(0, 1 - beta * delta)   (Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657)"""
    return torch.relu(1 - beta * terms.delta)


def ipo(terms: PairTerms, *, beta: float) -> Tensor:
    """(s_c / L_c - s_r / L_r - 1 / (2 * beta))^2, L the completion lengths in tokens.

    Azar et al. 2023, arXiv:2310.12036, eq. 17, where beta is called tau; the mean over tokens in place of the sum is
    how its authors run it.
    """
    return (_mean_score_difference(terms) - 1 / (2 * beta)) ** 2


def sigmoid_norm(terms: PairTerms, *, beta: float) -> Tensor:
    """-logsigmoid(beta * (s_c / L_c - s_r / L_r)), L the completion lengths: DPO on means over tokens.

    Lambert et al. 2024 (Tulu 3), arXiv:2411.15124.
    """
    return -F.logsigmoid(beta * _mean_score_difference(terms))


def _mean_score_difference(terms: PairTerms) -> Tensor:
    chosen = terms.per_token(terms.chosen_scores, terms.chosen_lengths)
    return chosen - terms.per_token(terms.rejected_scores, terms.rejected_lengths)


def exo_pair(terms: PairTerms, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(q || p) = q (log q - log(1 - eps)) + (1 - q) (log(1 - q) - log eps), q = sigmoid(beta * delta), eps > 0.

    Ji et al. 2024, arXiv:2402.00856, eq. 16: the distribution over the two answers against the smoothed label.
    """
    logits = beta * terms.delta
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    return right + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))


def nca_pair(terms: PairTerms, *, beta: float) -> Tensor:
    """-logsigmoid(beta Delta_c) - logsigmoid(-beta Delta_c) / 2 - logsigmoid(-beta Delta_r) / 2

    Chen et al. 2024, arXiv:2402.05369, for two answers.
    """
    chosen, rejected = beta * terms.chosen_logratios, beta * terms.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(-(1 - eps) * logsigmoid(beta * delta) + eps * logsigmoid(-beta * delta)) / (1 - 2 * eps), eps < 1/2.

    Chowdhury et al. 2024, arXiv:2403.00409: unbiased where a share eps of the labels is flipped at random.
    """
    logits = beta * terms.delta
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return losses / (1 - 2 * label_smoothing)


def bco_pair(terms: PairTerms, *, beta: float) -> Tensor:
    """-logsigmoid(beta Delta_c) - logsigmoid(-beta Delta_r)   (Jung et al. 2024, arXiv:2404.04656, without shift)"""
    return -F.logsigmoid(beta * terms.chosen_logratios) - F.logsigmoid(-beta * terms.rejected_logratios)


def sppo_hard(terms: PairTerms, *, beta: float) -> Tensor:
    """(Delta_c - 1 / (2 beta))^2 + (Delta_r + 1 / (2 beta))^2

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with the win probability of the chosen answer taken as 1.
    """
    return (terms.chosen_logratios - 0.5 / beta) ** 2 + (terms.rejected_logratios + 0.5 / beta) ** 2


def apo_zero(terms: PairTerms, *, beta: float) -> Tensor:
    """1 - sigmoid(beta Delta_c) + sigmoid(beta Delta_r)

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7: for chosen answers better than what the model says.
    """
    return torch.sigmoid(-beta * terms.chosen_logratios) + torch.sigmoid(beta * terms.rejected_logratios)


def apo_down(terms: PairTerms, *, beta: float) -> Tensor:
    """sigmoid(beta Delta_c) + 1 - sigmoid(beta (Delta_c - Delta_r))

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8: for chosen answers worse than what the model says.
    """
    chosen = terms.chosen_logratios
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - terms.rejected_logratios))


def discopop(terms: PairTerms, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """-(1 - m) * logsigmoid(l) + m * e^(-l), l = beta * delta, m = sigmoid(l / tau)

    Lu et al. 2024, arXiv:2406.08414, eq. 5 (log-ratio modulated loss). m * e^(-l) is formed as e^(log m - l).
    """
    logits = beta * terms.delta
    modulation = logits / discopop_tau
    exponential = torch.exp((F.logsigmoid(modulation) - logits).clamp(max=80.0))
    return -torch.sigmoid(-modulation) * F.logsigmoid(logits) + exponential


def dpop(terms: PairTerms, *, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """-logsigmoid(beta * (Delta_c - Delta_r - lambda * max(0, -Delta_c)))

    Pal et al. 2024, arXiv:2402.13228 (DPO-Positive): a chosen answer must not become less likely than it was.
    """
    chosen = terms.chosen_logratios
    return -F.logsigmoid(beta * (chosen - terms.rejected_logratios - dpop_lambda * torch.relu(-chosen)))


def aot(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The form of `sigmoid` on sort(logp_c - logp_r) - sort(ref_c - ref_r), both sorted over the batch.

    Melnyk et al. 2024, arXiv:2406.05882, on paired data. An entry of the result belongs to a rank, not to a pair.
    """
    policy = (terms.chosen_logps - terms.rejected_logps).sort().values
    reference = (terms.ref_chosen_logps - terms.ref_rejected_logps).sort().values
    return smoothed_log_loss(beta * (policy - reference), label_smoothing)


def aot_unpaired(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The form of `sigmoid` on sort(logp_c - ref_c) - sort(logp_r - ref_r), both sorted over the batch.

    Melnyk et al. 2024, arXiv:2406.05882, on unpaired data. An entry of the result belongs to a rank, not to a pair.
    """
    delta = terms.chosen_logratios.sort().values - terms.rejected_logratios.sort().values
    return smoothed_log_loss(beta * delta, label_smoothing)
