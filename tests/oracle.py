"""What is true: float64, written from the formulas, slow. Shares no code with fastdpo."""

import torch
from torch import Tensor


def transformed(logits: Tensor, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0):
    """z of raw logits, in the dtype of logits."""
    z = logit_scale * logits
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logprobs(logits: Tensor, labels: Tensor, ignore_index: int = -100, **options) -> dict[str, Tensor]:
    """logits (N, V), labels (N,) -> logps, lse (N,), stats (4, N), all float64, with the edges of the contract."""
    n, v = logits.shape
    logps, lse, stats = torch.zeros(n).double(), torch.zeros(n).double(), torch.zeros(4, n).double()
    for i, label in enumerate(labels.tolist()):
        if label == ignore_index:
            continue
        z = transformed(logits[i].double(), **options)
        lse[i] = torch.logsumexp(z, 0)
        logp = torch.log_softmax(z, 0)
        p = logp.exp()
        p = p / p.sum()  # a rounding of the normalizer makes all of p wrong alike, which float64 tests see
        possible = p > 0
        stats[0, i] = -(p * logp)[possible].sum()
        stats[1, i] = z.mean()
        stats[3, i] = (p * p).sum().log()
        if 0 <= label < v:
            logps[i] = logp[label]
            stats[2, i] = float(z[label] >= z.max())
        else:
            logps[i] = torch.nan
    return {"logps": logps, "lse": lse, "stats": stats}


def token_logprobs_gradient(logits: Tensor, labels: Tensor, grad_logps: Tensor, ignore_index: int = -100, **options):
    """d (sum grad_logps * logps) / d logits, (N, V) float64, by autograd row by row."""
    n, v = logits.shape
    gradient = torch.zeros(n, v).double()
    for i, label in enumerate(labels.tolist()):
        if label == ignore_index:
            continue
        if not 0 <= label < v:
            gradient[i] = torch.nan
            continue
        x = logits[i].double().requires_grad_()
        logp = torch.log_softmax(transformed(x, **options), 0)[label]
        (gradient[i],) = torch.autograd.grad(grad_logps[i].double() * logp, x)
    return gradient


def linear_token_logprobs(hidden, weight, labels, bias=None, ignore_index=-100, **options) -> Tensor:
    """(N, D), (V, D), (N,) -> logps (N,), differentiable, float64; labels in range or ignored."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logps = torch.log_softmax(transformed(logits, **options), -1)
    kept = labels != ignore_index
    picked = logps.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1)
    return torch.where(kept, picked, 0.0)
