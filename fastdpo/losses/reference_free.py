"""Losses on pairs without a reference. Each maps PairTerms to (B,) losses.

NLL_c is the chosen answers' negative log-prob a token: its mean over the batch is the mean over all their tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.divergence import power_score
from fastdpo.losses.paired import smoothed_log_loss
from fastdpo.losses.terms import PairTerms


def sft(terms: PairTerms, *, beta: float) -> Tensor:
    """NLL_c = -logp_c / mean(L_c): summed over the batch, the mean over all tokens of chosen answers, times B.

    Supervised fine-tuning on the chosen answers, to be mixed with another loss: RPO (Pang et al. 2024,
    arXiv:2404.19733), MPO (Wang et al. 2024, arXiv:2411.10442). beta plays no part.
    """
    return terms.chosen_nll


def cpo(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0, cpo_alpha: float = 1.0) -> Tensor:
    """The form of `sigmoid` on beta (logp_c - logp_r), plus alpha * NLL_c

    Xu et al. 2024, arXiv:2401.08417; label smoothing as in conservative DPO.
    """
    losses = smoothed_log_loss(beta * (terms.chosen_logps - terms.rejected_logps), label_smoothing)
    return losses + cpo_alpha * terms.chosen_nll if cpo_alpha else losses


def simpo(terms: PairTerms, *, beta: float, label_smoothing: float = 0.0, simpo_gamma: float = 0.5) -> Tensor:
    """The form of `sigmoid` on beta (logp_c / L_c - logp_r / L_r) - gamma

    Meng et al. 2024, arXiv:2405.14734, eq. 6 (beta 2 to 2.5 and gamma / beta about 0.5 there).
    """
    logits = beta * (terms.chosen_mean_logps - terms.rejected_mean_logps) - simpo_gamma
    return smoothed_log_loss(logits, label_smoothing)


def alphapo(
    terms: PairTerms,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alphapo_alpha: float = 0.25,
) -> Tensor:
    """The form of `simpo` on rewards r = (1 - e^(-alpha * m)) / alpha, m = logp / L, in place of m itself.

    Gupta et al. 2025, arXiv:2501.03884, eq. 8; alpha = 0 is SimPO, and 0.25 or 0.1 is what its authors take.
    """
    chosen, rejected = alphapo_rewards(terms, beta=beta, alphapo_alpha=alphapo_alpha)
    return smoothed_log_loss(chosen - rejected - simpo_gamma, label_smoothing)


def alphapo_rewards(terms: PairTerms, *, beta: float, alphapo_alpha: float, **_: float) -> tuple[Tensor, Tensor]:
    """beta * r of the chosen and of the rejected answers."""
    chosen, rejected = terms.chosen_mean_logps, terms.rejected_mean_logps
    return beta * power_score(chosen, -alphapo_alpha), beta * power_score(rejected, -alphapo_alpha)


def orpo(terms: PairTerms, *, beta: float) -> Tensor:
    """NLL_c - beta * logsigmoid(log odds_c - log odds_r), log odds = m - log(1 - e^m), m = logp / L

    Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7, where beta is called lambda.
    """
    return terms.chosen_nll - beta * F.logsigmoid(_log_odds_ratio(terms))


def _log_odds_ratio(terms: PairTerms) -> Tensor:
    return _log_odds(terms.chosen_mean_logps) - _log_odds(terms.rejected_mean_logps)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^mean_logps; p = 1 is taken as the largest number below it."""
    below = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def nll_extras(terms: PairTerms) -> dict[str, Tensor]:
    return {"nll_loss": terms.chosen_nll.mean()}


def orpo_extras(terms: PairTerms) -> dict[str, Tensor]:
    """Under the names that ORPO's authors log."""
    ratio = _log_odds_ratio(terms)
    return {**nll_extras(terms), "log_odds_ratio": F.logsigmoid(ratio).mean(), "log_odds_chosen": ratio.mean()}
