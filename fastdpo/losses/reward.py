"""The loss of a reward model, on the scores it gives to the two answers of a pair."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.terms import PairTerms


def reward(terms: PairTerms, *, beta: float, center_rewards_coefficient: float = 0.0) -> Tensor:
    """-logsigmoid(r_c - r_r - margin) + c * (r_c + r_r)^2, r the scores given in place of log-probs.

    Bradley & Terry 1952; the margin, one a pair, from Touvron et al. 2023, arXiv:2307.09288, eq. 2; the centring from
    Eisenstein et al. 2023, arXiv:2312.09244. beta plays no part.
    """
    chosen, rejected = terms.chosen_logps, terms.rejected_logps
    difference = chosen - rejected
    losses = -F.logsigmoid(difference if terms.margins is None else difference - terms.margins)
    if center_rewards_coefficient:
        losses = losses + center_rewards_coefficient * (chosen + rejected) ** 2
    return losses
