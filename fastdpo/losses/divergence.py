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

    Exponents end where their value would leave `dtype`, that of the numbers whose gradient this becomes: beyond it the
    score is constant.
    """

    name: str = "reverse_kl"
    alpha: float = 0.5
    dtype: torch.dtype = torch.float32

    def __call__(self, logratios: Tensor) -> Tensor:
        if self.name == "forward_kl":
            return self._alpha(logratios, 0.0)
        if self.name == "js_divergence":
            return math.log(2) + F.logsigmoid(logratios)
        if self.name == "alpha_divergence" and abs(self.alpha - 1) >= 1e-6:
            return self._alpha(logratios, self.alpha)
        return logratios

    def _alpha(self, logratios: Tensor, alpha: float) -> Tensor:
        # bfloat16 and float32 reach e^88, float16 e^11.09, float64 e^709.
        largest = {torch.float16: 11.0, torch.float64: 700.0}.get(self.dtype, 80.0)
        return torch.expm1(((alpha - 1) * logratios).clamp(max=largest)) / (alpha - 1)


REVERSE_KL = Divergence()
