"""What the losses are: float64, answer by answer, from the papers' formulas. Shares no code with fastdpo.

Naive exp and log throughout, so for log-ratios of ordinary size only; differentiable, for the gradients.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def log_sigma(x: Tensor) -> Tensor:
    return torch.log(1 / (1 + torch.exp(-x)))


def score(x: Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """f'(u) at u = pi / pi_ref = e^x, plus the constant that makes it 0 at x = 0 (Wang 2023, table 1)."""
    u = torch.exp(x)
    if divergence == "reverse_kl":  # f(u) = u log u
        return torch.log(u)
    if divergence == "forward_kl":  # f(u) = -log u
        return 1 - 1 / u
    if divergence == "js_divergence":  # f(u) = u log u - (u + 1) log((u + 1) / 2)
        return torch.log(2 * u / (1 + u))
    if divergence == "alpha_divergence":
        return torch.log(u) if alpha == 1 else (u ** (alpha - 1) - 1) / (alpha - 1)
    raise KeyError(divergence)


def log_odds(logp: Tensor, length: Tensor) -> Tensor:
    p = torch.exp(logp / length)
    return torch.log(p / (1 - p))


def alpha_reward(mean_logp: Tensor, alpha: float) -> Tensor:
    """(1 - p^(-alpha)) / alpha of p, the geometric mean of the tokens' probabilities."""
    return mean_logp if alpha == 0 else (1 - torch.exp(mean_logp) ** -alpha) / alpha


def smoothed(x: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * log_sigma(x) - eps * log_sigma(-x)


def exo(x: Tensor, eps: float) -> Tensor:
    """KL of the model's choice between the two answers from the smoothed label."""
    model, label = (sigma(x), 1 - sigma(x)), (1 - eps, eps)
    return sum(p * torch.log(p / q) for p, q in zip(model, label, strict=True))


def discopop(x: Tensor, tau: float) -> Tensor:
    m = sigma(x / tau)
    return (1 - m) * -log_sigma(x) + m * torch.exp(-x)


# Of one pair. b beta, e label smoothing, c and r log-probs, dc and dr log-ratios, sc and sr scores, lc and lr lengths,
# nll the chosen answer's share of the token-mean negative log-likelihood.
PAIR_FORMULAS = {
    "sigmoid": lambda p: smoothed(p.b * (p.sc - p.sr), p.e),
    "hinge": lambda p: max(0 * p.sc, 1 - p.b * (p.sc - p.sr)),
    "ipo": lambda p: (p.sc / p.lc - p.sr / p.lr - 1 / (2 * p.b)) ** 2,
    "exo_pair": lambda p: exo(p.b * (p.sc - p.sr), p.e),
    "nca_pair": lambda p: -log_sigma(p.b * p.dc) - log_sigma(-p.b * p.dc) / 2 - log_sigma(-p.b * p.dr) / 2,
    "robust": lambda p: (
        (-(1 - p.e) * log_sigma(p.b * (p.sc - p.sr)) + p.e * log_sigma(-p.b * (p.sc - p.sr))) / (1 - 2 * p.e)
    ),
    "bco_pair": lambda p: -log_sigma(p.b * p.dc) - log_sigma(-p.b * p.dr),
    "sppo_hard": lambda p: (p.dc - 1 / (2 * p.b)) ** 2 + (p.dr + 1 / (2 * p.b)) ** 2,
    "apo_zero": lambda p: 1 - sigma(p.b * p.dc) + sigma(p.b * p.dr),
    "apo_down": lambda p: sigma(p.b * p.dc) + 1 - sigma(p.b * (p.dc - p.dr)),
    "discopop": lambda p: discopop(p.b * (p.sc - p.sr), p.discopop_tau),
    "sigmoid_norm": lambda p: -log_sigma(p.b * (p.sc / p.lc - p.sr / p.lr)),
    "dpop": lambda p: -log_sigma(p.b * (p.dc - p.dr - p.dpop_lambda * max(0 * p.dc, -p.dc))),
    "sft": lambda p: p.nll,
    "orpo": lambda p: p.nll - p.b * log_sigma(log_odds(p.c, p.lc) - log_odds(p.r, p.lr)),
    "simpo": lambda p: smoothed(p.b * p.c / p.lc - p.b * p.r / p.lr - p.simpo_gamma, p.e),
    "alphapo": lambda p: smoothed(
        p.b * (alpha_reward(p.c / p.lc, p.alphapo_alpha) - alpha_reward(p.r / p.lr, p.alphapo_alpha)) - p.simpo_gamma,
        p.e,
    ),
    "cpo": lambda p: smoothed(p.b * (p.c - p.r), p.e) + p.cpo_alpha * p.nll,
    "reward": lambda p: -log_sigma(p.c - p.r - p.margin) + p.center_rewards_coefficient * (p.c + p.r) ** 2,
}
DEFAULTS = {
    "discopop_tau": 0.05,
    "dpop_lambda": 50.0,
    "simpo_gamma": 0.5,
    "alphapo_alpha": 0.25,
    "cpo_alpha": 1.0,
    "center_rewards_coefficient": 0.0,
}


def pair_losses(
    name, chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0, lengths=None, *, pair_weights=None,
    margins=None, divergence="reverse_kl", alpha=0.5, **options,
) -> Tensor:  # fmt: skip
    """(B,) losses in float64; references of None are absent."""
    chosen, rejected = chosen.double(), rejected.double()
    none = torch.zeros(len(chosen), dtype=torch.float64)
    ref_chosen = none if ref_chosen is None else ref_chosen.double()
    ref_rejected = none if ref_rejected is None else ref_rejected.double()
    if name == "aot":
        difference = ordered(chosen - rejected) - ordered(ref_chosen - ref_rejected)
        return torch.stack([smoothed(beta * x, label_smoothing) for x in difference])
    if name == "aot_unpaired":
        difference = ordered(chosen - ref_chosen) - ordered(rejected - ref_rejected)
        return torch.stack([smoothed(beta * x, label_smoothing) for x in difference])
    token_mean = None if lengths is None else mean_length(lengths[0].tolist(), pair_weights)
    losses = []
    for i in range(len(chosen)):
        pair = SimpleNamespace(b=beta, e=label_smoothing, c=chosen[i], r=rejected[i], **{**DEFAULTS, **options})
        pair.dc, pair.dr = pair.c - ref_chosen[i], pair.r - ref_rejected[i]
        pair.sc, pair.sr = score(pair.dc, divergence, alpha), score(pair.dr, divergence, alpha)
        pair.margin = 0.0 if margins is None else margins[i].double()
        if lengths is not None:
            pair.lc, pair.lr = lengths[0][i].double(), lengths[1][i].double()
            pair.nll = -pair.c / token_mean
        losses.append(PAIR_FORMULAS[name](pair))
    return torch.stack(losses)


def mean_length(lengths, weights=None) -> float:
    weights = [1.0] * len(lengths) if weights is None else weights.tolist()
    return math.fsum(w * n for w, n in zip(weights, lengths, strict=True)) / math.fsum(weights)


def ranked_losses(logps, ref_logps, sizes, beta, *, divergence="reverse_kl", alpha=0.5) -> Tensor:
    """(B,) of lists, best first: the log of the chance that one draws them in this order without putting back."""
    start, losses = 0, []
    for size in sizes:
        ratios = logps[start : start + size].double()
        if ref_logps is not None:
            ratios = ratios - ref_logps[start : start + size].double()
        worth = [torch.exp(beta * score(x, divergence, alpha)) for x in ratios]
        chance = 1.0
        for k in range(size):
            chance = chance * worth[k] / sum(worth[k:])
        losses.append(-torch.log(chance))
        start += size
    return torch.stack(losses)


def answer_losses(
    name, logps, ref_logps, desirable, beta, *, kl=0.0, desirable_weight=1.0, undesirable_weight=1.0
) -> Tensor:
    """(B,) of single answers: lambda - value of the gain or loss against the reference point (0 for apo)."""
    point = max(0.0, float(kl)) if name == "kto" else 0.0
    losses = []
    for logp, ref, good in zip(logps.double(), ref_logps.double(), desirable.tolist(), strict=True):
        gain = beta * (logp - ref - point)
        losses.append(desirable_weight * (1 - sigma(gain)) if good else undesirable_weight * (1 - sigma(-gain)))
    return torch.stack(losses)


def reduced(losses: Tensor, pair_weights: Tensor | None, reduction: str) -> Tensor:
    weights = torch.ones_like(losses) if pair_weights is None else pair_weights.double()
    if reduction == "none":
        return weights * losses
    total = (weights * losses).sum()
    return total if reduction == "sum" else total / weights.sum()


def ordered(values: Tensor) -> Tensor:
    """From the smallest to the largest, differentiable."""
    return values[sorted(range(len(values)), key=values.detach().tolist().__getitem__)]
