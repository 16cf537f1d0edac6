"""Losses on ranked lists of completions of one prompt. Each maps ListTerms to (B,) losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.terms import ListTerms


def listwise(terms: ListTerms, *, beta: float) -> Tensor:
    """-sum_k log softmax(beta * s_k, ..., beta * s_K)_k, the completions 1 ... K from best to worst.

    Plackett-Luce over the ranking: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3. K = 2 is `sigmoid`.
    """
    valid = terms.valid
    scores = torch.where(valid, beta * terms.scores, 0.0)
    places = torch.arange(valid.shape[1], device=valid.device)
    left = (places[None, :] >= places[:, None]) & valid[:, None, :]  # (B, k, j): j has not been chosen before k
    remaining = torch.where(left, scores[:, None, :], -torch.inf)
    remaining = torch.where(valid[:, :, None], remaining, 0.0)  # a row of -inf alone would have no gradient
    return torch.where(valid, torch.logsumexp(remaining, dim=2) - scores, 0.0).sum(dim=1)
