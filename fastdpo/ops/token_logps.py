"""Per-token log-probs from logits, with the gradient written by one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.dispatch import LogitOptions, check_float, check_labels, row_kernels
from fastdpo.types import IGNORE_INDEX, TokenStats, accumulation_dtype


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor:
    """log_softmax(z, -1).gather(-1, labels), with z = softcap * tanh(logit_scale * logits / softcap) / temperature.

    Without `softcap`, z = logit_scale * logits / temperature. There is no shift: labels[i] is the token whose
    log-prob logits[i] gives.

    Args:
        logits: (..., V) bfloat16, float16, float32 or float64, on CPU or GPU.
        labels: (...) integers in [0, V), or `ignore_index`.
        ignore_index: rows with this label are not read; their log-prob is 0 and their gradient zero.
        inplace_backward: the backward writes the gradient over `logits`, which saves a second tensor of that size.
            Allow it only where nothing else reads the logits afterwards; a second backward through them raises.
        impl: "auto" (Triton on a GPU, eager PyTorch elsewhere), "triton" or "eager".

    Returns:
        (...) float32 (float64 for float64 logits), in nats. A label outside [0, V) gives NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an option out of range.
    """
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    return token_logps_with_stats(logits, labels, options, stats=False, inplace_backward=inplace_backward, impl=impl)[0]


def token_logps_with_stats(
    logits: Tensor,
    labels: Tensor,
    options: LogitOptions,
    *,
    stats: bool = True,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, TokenStats | None]:
    """As `token_logps`; with `stats`, also the token statistics of the same pass (detached; zero where ignored)."""
    check_float("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits has no dimension; it must have shape (..., V).")
    check_labels(labels, logits.shape[:-1], logits, "logits")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; the vocabulary (last dimension) must not be empty.")
    kernels = row_kernels(impl, logits)
    logps, rows = TokenLogpsFunction.apply(logits, labels.long(), options, stats, inplace_backward, kernels)
    return logps, None if rows is None else TokenStats(*(row.view(labels.shape) for row in rows.unbind(0)))


def _as_rows(tensor: Tensor) -> list[Tensor]:
    """Views of (..., V) as 2-D row blocks (N, V), contiguous in V; one block where the strides allow it, no copy."""
    if tensor.dim() == 1:
        return [tensor.unsqueeze(0)]
    if tensor.dim() == 2:
        return [tensor]
    try:
        return [tensor.view(-1, tensor.shape[-1])]
    except RuntimeError:  # a slice such as logits[:, :-1]: its leading dimensions do not collapse
        return [rows for part in tensor.unbind(0) for rows in _as_rows(part)]


class TokenLogpsFunction(torch.autograd.Function):
    """Forward keeps logits and log-sum-exp; backward forms grad * (onehot - p) * dz/dx."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, options: LogitOptions, stats: bool, inplace: bool, kernels: Any
    ) -> tuple[Tensor, Tensor | None]:
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            logits, inplace = logits.contiguous(), False
        n = labels.numel()
        dtype = accumulation_dtype(logits.dtype)
        logps = torch.empty(labels.shape, dtype=dtype, device=logits.device)
        lse = torch.empty(n, dtype=dtype, device=logits.device)
        all_stats = torch.empty((4, n), dtype=dtype, device=logits.device) if stats else None
        start = 0
        flat_labels, flat_logps = labels.reshape(-1), logps.view(-1)
        for rows in _as_rows(logits):
            part = slice(start, start + rows.shape[0])
            out = kernels.token_logprobs_fwd(rows, flat_labels[part], stats=stats, **options.kwargs())
            flat_logps[part], lse[part] = out[0], out[1]
            if all_stats is not None:
                all_stats[:, part] = out[2]
            start = part.stop
        ctx.save_for_backward(logits, flat_labels, lse)
        ctx.options, ctx.inplace, ctx.kernels = options, inplace, kernels
        if all_stats is not None:
            ctx.mark_non_differentiable(all_stats)
        return logps, all_stats

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        out = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        out_rows = None if ctx.inplace else out.view(-1, out.shape[-1])
        grad_logps = grad_logps.reshape(-1).to(lse.dtype)
        start = 0
        for rows in _as_rows(logits):
            part = slice(start, start + rows.shape[0])
            target = rows if out_rows is None else out_rows[part]
            ctx.kernels.token_logprobs_bwd(
                rows, labels[part], lse[part], grad_logps[part], out=target, **ctx.options.kwargs()
            )
            start = part.stop
        if ctx.inplace:
            # Autograd now knows that the saved logits are gone: a second backward raises instead of using them.
            torch.autograd.graph.increment_version(logits)
            out = out.detach()
        return out, None, None, None, None, None
