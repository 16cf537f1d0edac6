"""Per-token log-probs from logits, with the gradient written by one kernel.

token_logprobs_fwd, token_logprobs_bwd (kernels) <- the operators fastdpo::token_logps, token_logps_backward and
token_logps_backward_ <- `token_logps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.dispatch import LogitOptions, check_float, check_impl, check_labels, row_kernels
from fastdpo.ops.library import define, first_derivative_only, refuse_transforms, see_products
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
    log-prob logits[i] gives. One read of the logits forward, one read and one write backward; nothing waits for the
    device. An operator of torch.library: `torch.compile(fullgraph=True)` traces through it.

    Args:
        logits: (..., V) bfloat16, float16, float32 or float64, on CPU or GPU. -inf is a legal mask (without `softcap`,
            which makes it -softcap).
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
    check_impl(impl)
    refuse_transforms("token_logps", logits)
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    see_products()
    logps, _, rows = _forward_op(logits, labels.long(), *options.as_arguments(), stats, inplace_backward, impl)
    return logps, TokenStats.from_rows(rows) if stats else None


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


def _outputs(logits: Tensor, labels: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized logps (...), norms (2, ...), statistics (4, ...), or (0, ...) where not asked for."""
    dtype = accumulation_dtype(logits.dtype)
    logps = torch.empty(labels.shape, dtype=dtype, device=logits.device)
    return logps, logps.new_empty((2, *labels.shape)), logps.new_empty((4 if stats else 0, *labels.shape))


def _forward(
    logits: Tensor, labels: Tensor, ignore_index: int, temperature: float, softcap: float | None, logit_scale: float,
    stats: bool, inplace_backward: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernels, options = row_kernels(impl, logits), LogitOptions(ignore_index, temperature, softcap, logit_scale)
    logps, norms, all_stats = _outputs(logits, labels, stats)
    n = labels.numel()
    flat_labels, flat_logps, flat_norms = labels.reshape(-1), logps.view(-1), norms.view(2, n)
    flat_stats = all_stats.view(all_stats.shape[0], n)
    start = 0
    for rows in _as_rows(logits):
        part = slice(start, start + rows.shape[0])
        out = kernels.token_logprobs_fwd(rows, flat_labels[part], stats=stats, **options.kwargs())
        flat_logps[part], flat_norms[:, part] = out[0], out[1]
        if stats:
            flat_stats[:, part] = out[2]
        start = part.stop
    return logps, norms, all_stats


def _backward_into(
    out: Tensor, grad_logps: Tensor, logits: Tensor, labels: Tensor, norms: Tensor, options: LogitOptions, impl: str
) -> None:
    kernels = row_kernels(impl, logits)
    flat_labels, flat_grad = labels.reshape(-1), grad_logps.reshape(-1).to(norms.dtype)
    flat_norms = norms.reshape(2, labels.numel())
    start = 0
    for rows, target in zip(_as_rows(logits), _same_rows(out, logits), strict=True):
        part = slice(start, start + rows.shape[0])
        kernels.token_logprobs_bwd(
            rows, flat_labels[part], flat_norms[:, part], flat_grad[part], out=target, **options.kwargs()
        )
        start = part.stop


def _same_rows(out: Tensor, logits: Tensor) -> list[Tensor]:
    """`out`, contiguous or `logits` itself, in blocks of as many rows as those of `logits`."""
    if out is logits:
        return _as_rows(logits)
    return list(out.view(-1, out.shape[-1]).split([rows.shape[0] for rows in _as_rows(logits)]))


def _backward(
    grad_logps: Tensor, logits: Tensor, labels: Tensor, norms: Tensor, ignore_index: int, temperature: float,
    softcap: float | None, logit_scale: float, impl: str,
) -> Tensor:  # fmt: skip
    """grad_logps * (onehot - p) * dz/dx, (..., V), contiguous."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    _backward_into(out, grad_logps, logits, labels, norms, options, impl)
    return out


def _backward_(
    grad_logps: Tensor, logits: Tensor, labels: Tensor, norms: Tensor, ignore_index: int, temperature: float,
    softcap: float | None, logit_scale: float, impl: str,
) -> None:  # fmt: skip
    """The same, written over the logits."""
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    _backward_into(logits, grad_logps, logits, labels, norms, options, impl)


_forward_op = define("token_logps", _forward)
_forward_op.register_fake(lambda logits, labels, *arguments: _outputs(logits, labels, stats=arguments[4]))
_backward_op = define("token_logps_backward", _backward)
_backward_op.register_fake(
    lambda grad_logps, logits, *arguments: torch.empty_like(logits, memory_format=torch.contiguous_format)
)
_backward_op_ = define("token_logps_backward_", _backward_, mutates=("logits",))
_backward_op_.register_fake(lambda *arguments: None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *options, _, ctx.inplace, ctx.impl = inputs
    ctx.options = options
    _, norms, stats = output
    ctx.mark_non_differentiable(norms, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, norms)


@first_derivative_only("token_logps")
def _autograd(ctx: Any, grad_logps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_logps is None:
        return (None,) * 9
    logits, labels, norms = ctx.saved_tensors
    arguments = (grad_logps, logits, labels, norms, *ctx.options, ctx.impl)
    if not ctx.inplace:
        return _backward_op(*arguments), *(None,) * 8
    # The operator marks the saved logits as changed: a second backward raises instead of using what is left of them.
    _backward_op_(*arguments)
    return logits.detach(), *(None,) * 8


_forward_op.register_autograd(_autograd, setup_context=_setup_context)
