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


def pair_losses(name, chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0, lengths=None) -> Tensor:
    """(B,) losses in float64, each written from its paper's formula, without log-sigmoid's stable form."""
    chosen, rejected, ref_chosen, ref_rejected = (t.double() for t in (chosen, rejected, ref_chosen, ref_rejected))
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    if name == "aot":
        margin = beta * (ordered(chosen - rejected) - ordered(ref_chosen - ref_rejected))
    if name == "aot_unpaired":
        margin = beta * (ordered(chosen - ref_chosen) - ordered(rejected - ref_rejected))
    if name in ("sigmoid", "aot", "aot_unpaired"):
        right, wrong = 1 / (1 + torch.exp(-margin)), 1 / (1 + torch.exp(margin))
        return -((1 - label_smoothing) * torch.log(right) + label_smoothing * torch.log(wrong))
    if name == "hinge":
        return torch.maximum(torch.zeros_like(margin), 1 - margin)
    if name == "ipo":
        per_token = (chosen - ref_chosen) / lengths[0].double() - (rejected - ref_rejected) / lengths[1].double()
        return (per_token - 0.5 / beta).square()
    raise KeyError(name)


def ordered(values: Tensor) -> Tensor:
    """From the smallest to the largest, differentiable."""
    return values[sorted(range(len(values)), key=values.detach().tolist().__getitem__)]
