"""The f-divergences that may take the place of DPO's Kullback-Leibler divergence.

Wang et al. 2023, arXiv:2309.16240.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class Divergence:
    """score(x) = f'(e^x) of a log-ratio x = log pi - log pi_ref, up to constants; beta times it is the implicit reward.

        reverse_kl         x
        forward_kl         1 - e^(-x)
        js_divergence      log 2 + logsigmoid(x)
        alpha_divergence   (e^((alpha - 1) x) - 1) / (alpha - 1); alpha -> 1 is reverse_kl, alpha = 0 forward_kl

    Exponents end where the square of their value would leave the range of the arithmetic (at 40; in float64 at 340):
    beyond it the score is constant.
    """

    name: str = "reverse_kl"
    alpha: float = 0.5

    def __call__(self, logratios: Tensor) -> Tensor:
        if self.name == "forward_kl":
            return power_score(logratios, -1.0)
        if self.name == "js_divergence":
            return math.log(2) + F.logsigmoid(logratios)
        if self.name == "alpha_divergence" and abs(self.alpha - 1) >= 1e-6:
            return power_score(logratios, self.alpha - 1)
        return logratios


def power_score(logs: Tensor, exponent: float) -> Tensor:
    """(e^(exponent * x) - 1) / exponent; x itself where the exponent is 0. Constant beyond the largest exponent."""
    if exponent == 0:
        return logs
    largest = 340.0 if logs.dtype == torch.float64 else 40.0
    return torch.expm1((exponent * logs).clamp(max=largest)) / exponent


REVERSE_KL = Divergence()
