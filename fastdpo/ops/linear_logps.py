"""Per-token log-probs from hidden states, without the logits of all tokens.

linear_logprobs (kernels) <- the operators fastdpo::linear_token_logps and linear_token_logps_backward <-
`linear_token_logps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.budget import named_if_out_of_memory, plan, resolve_budget
from fastdpo.ops.dispatch import LogitOptions, check_impl, check_linear, compute_dtype, row_kernels
from fastdpo.ops.head_backend import head_scores
from fastdpo.ops.into_grad import add_scaled, grad_to_add_to
from fastdpo.ops.library import define, first_derivative_only, refuse_transforms, requires_grad, see_products
from fastdpo.types import IGNORE_INDEX, TokenStats, accumulation_dtype
from fastdpo_kernels import linear_logprobs as kernel


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    head_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """token_logps(hidden @ weight.T + bias, labels), as much of the logits at a time as the memory budget holds.

    Args:
        hidden: (N, D) floating point.
        weight: (V, D), the head's weight. Where its dtype is another than that of the products, it is cast a slab at a
            time.
        labels: (N,) integers in [0, V), or `ignore_index`. On a CPU rows without a target cost nothing; on a GPU to
            leave them out would be a sync, so pass only rows that have one.
        bias: (V,) or None.
        head_dtype: dtype of logits and products. Default: that of autocast where it is on, else that of `hidden`.
            `torch.float32` gives a float32 head to a bfloat16 model.
        memory_budget: bytes that logits may take. Default: on a CPU 64 MiB; on a GPU an eighth of the memory that was
            free at the first call there (apart for calls with gradients and without), but at least 4,096 rows as far as
            half of it holds them. The process keeps to that, for the size of the tile decides how sums are rounded;
            where less is free later on, or another process must round alike, pass the bytes.
        impl: as in `token_logps`. With "auto", what needs no gradient may come from another package's kernels, where
            one is installed and agrees: see `fastdpo.ops.head_backend`.
        The other arguments are those of `token_logps`.

    Returns:
        (N,) float32 (float64 for a float64 head), in nats. Gradients reach hidden, weight and bias; a sum over several
        tiles for the weight runs in float32, in `weight.grad` itself where `backward` finds it there, without hooks and
        outside torch.distributed. What is done follows from what needs a gradient; with 2NDV FLOPs for one
        product, forward and backward together cost

            nothing needs one       2NDV            one tile of logits
            hidden alone            4NDV            one tile, and dlogp/dhidden (N, D)
            weight or bias, too     (8 - 2f)NDV     f: the share of the rows whose logits the budget holds

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an option out of range.
    """
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    return linear_token_logps_with_stats(
        hidden, weight, labels, options, bias=bias, stats=False, head_dtype=head_dtype, memory_budget=memory_budget,
        impl=impl,
    )[0]  # fmt: skip


def linear_token_logps_with_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LogitOptions,
    *,
    bias: Tensor | None = None,
    stats: bool = True,
    head_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, TokenStats | None]:
    """As `linear_token_logps`; with `stats`, also the token statistics of the same pass (zero where ignored)."""
    check_linear(hidden, weight, labels, bias)
    check_impl(impl)
    refuse_transforms("linear_token_logps", hidden, weight, bias)
    # A cast outside the operator: autograd brings the gradient back to the dtype of the tensor.
    hidden = hidden.to(compute_dtype(hidden, head_dtype))
    needs = needed_gradients(hidden, weight, bias)
    budget = resolve_budget(memory_budget, hidden.device, weight.shape[0], hidden.dtype, training=any(needs))
    labels, n = labels.long(), hidden.shape[0]
    targets = None
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = labels != options.ignore_index
        if not kept.all():
            (targets,) = kept.nonzero(as_tuple=True)
            hidden, labels = hidden[targets], labels[targets]
    tile, keep = plan(hidden.shape[0], weight.shape[0], hidden.dtype, budget, keep=needs[1] or needs[2])
    see_products()
    logps, _, rows, _ = _forward_op(
        hidden, weight, bias, labels, *options.as_arguments(), stats, *needs, tile, keep, impl
    )
    if targets is not None:
        logps = logps.new_zeros(n).index_put((targets,), logps)
        rows = rows.new_zeros(rows.shape[0], n).index_copy(1, targets, rows)
    return logps, TokenStats.from_rows(rows) if stats else None


def needed_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    if not torch.is_grad_enabled():
        return False, False, False
    return requires_grad(hidden), requires_grad(weight), bias is not None and requires_grad(bias)


def make_head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, options: LogitOptions, kernels: Any) -> Any:
    return kernel.Head(weight.detach(), None if bias is None else bias.detach(), dtype, options.kwargs(), kernels)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, temperature: float,
    softcap: float | None, logit_scale: float, stats: bool, needs_hidden: bool, needs_weight: bool, needs_bias: bool,
    tile: int, kept: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logps (N,), norms (2, N), statistics (4|0, N), and what the backward needs besides.

    That is u = dlogp/dhidden (N, D) for a frozen head, P~ of the kept rows (kept, V) for a trainable one, else (0, V).
    Of both the rows lack a factor, which stands in norms[0].
    """
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    head = make_head(weight, bias, hidden.dtype, options, row_kernels(impl, hidden))
    results = kernel.RowResults(hidden, stats)
    if not (stats or needs_hidden or needs_weight or needs_bias):
        score = head_scores(hidden, head, impl)
        if score is not None:
            return score(hidden, head.weight, labels), results.norms, results.stats, head.buffer(0)
    with named_if_out_of_memory(tile + kept, weight.shape[0], hidden.dtype):
        buffer = head.buffer(min(tile, hidden.shape[0] - kept))
        if needs_hidden and not (needs_weight or needs_bias):
            saved = kernel.fwd_with_hidden_grad(hidden, labels, head, results, buffer)
        else:
            saved = kernel.fwd_keeping(hidden, labels, head, results, buffer, kept=kept)
    return results.logps, results.norms, results.stats, saved


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, temperature: float,
    softcap: float | None, logit_scale: float, stats: bool, needs_hidden: bool, needs_weight: bool, needs_bias: bool,
    tile: int, kept: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    frozen = needs_hidden and not (needs_weight or needs_bias)
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty((2, n), dtype=dtype),
        hidden.new_empty((4 if stats else 0, n), dtype=dtype),
        hidden.new_empty(hidden.shape) if frozen else _rows_like(hidden, kept, weight.shape[0]),
    )


def _rows_like(hidden: Tensor, rows: int, vocabulary: int) -> Tensor:
    """As `Head.buffer`, in the dtype of hidden."""
    return hidden.new_empty((rows, kernel.row_stride(vocabulary)))[:, :vocabulary]


def _backward(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, norms: Tensor, p: Tensor,
    ignore_index: int, temperature: float, softcap: float | None, logit_scale: float, needs_hidden: bool,
    needs_weight: bool, needs_bias: bool, tile: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dhidden (N, D), dweight (V, D), dbias (V,), in the dtypes of their tensors; empty where not needed."""
    options = LogitOptions(ignore_index, temperature, softcap, logit_scale)
    needs = needs_hidden, needs_weight, needs_bias
    return _gradients(grad_logps, hidden, weight, bias, labels, norms, p, options, needs, tile, impl)


def _gradients(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, norms: Tensor, p: Tensor,
    options: LogitOptions, needs: tuple[bool, bool, bool], tile: int, impl: str, into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of `_backward`; with `into` (V, D) dweight is added to that, and empty."""
    head = make_head(weight, bias, hidden.dtype, options, row_kernels(impl, hidden))
    n, kept = hidden.shape[0], p.shape[0]
    count = kernel.tile_count(n, kept, tile)
    with named_if_out_of_memory(tile, weight.shape[0], hidden.dtype):
        grads = kernel.HeadGrads(head, weight=needs[1], bias=needs[2], tiles=count, weight_into=into)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        grad_logps, lift = grad_logps.to(norms.dtype), None
        if kept:
            scaled = grad_logps[:kept] * norms[0, :kept]
            kernel.tile_bwd(slice(0, kept), p, hidden, scaled, head, grads, dhidden)
        if hidden.dtype == torch.float16:  # as large as a loss scale makes them, where it does
            lift = (kernel.exponents(grad_logps.abs()) - 1).clamp(0, 12).exp2()
            grad_logps = grad_logps / lift
        buffer = head.buffer(min(tile, n - kept))
        kernel.bwd(hidden, labels, norms, grad_logps, head, grads, dhidden, buffer, lift=lift, start=kept)
        del buffer  # before the sum is cast
    dweight = grads.weight
    if into is not None and dweight is not None:
        if dweight is not into:
            add_scaled(into, dweight, torch.ones((), dtype=dweight.dtype, device=dweight.device))
        dweight = None
    return (
        hidden.new_empty(0) if dhidden is None else dhidden,
        weight.new_empty(0) if dweight is None else dweight.to(weight.dtype),
        weight.new_empty(0) if grads.bias is None or bias is None else grads.bias.to(bias.dtype),
    )


def _backward_fake(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, norms: Tensor, p: Tensor,
    ignore_index: int, temperature: float, softcap: float | None, logit_scale: float, needs_hidden: bool,
    needs_weight: bool, needs_bias: bool, tile: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(0) if bias is None or not needs_bias else bias.new_empty(bias.shape),
    )


_forward_op = define("linear_token_logps", _forward)
_forward_op.register_fake(_forward_fake)
_backward_op = define("linear_token_logps_backward", _backward)
_backward_op.register_fake(_backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *options, _, needs_hidden, needs_weight, needs_bias, tile, _, impl = inputs
    _, norms, stats, saved = output
    ctx.mark_non_differentiable(norms, stats, saved)
    ctx.set_materialize_grads(False)
    ctx.options, ctx.needs, ctx.tile, ctx.impl = options, (needs_hidden, needs_weight, needs_bias), tile, impl
    ctx.frozen_head = not (needs_weight or needs_bias)
    if ctx.frozen_head:
        ctx.save_for_backward(saved, norms)
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, norms, saved)


def _autograd(ctx: Any, grad_logps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_logps is None:
        return (None,) * 15
    ctx.makes_graph = torch.is_grad_enabled()
    return (_frozen_backward if ctx.frozen_head else _trainable_backward)(ctx, grad_logps)


@first_derivative_only("linear_token_logps", connected=False)
def _frozen_backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
    u, norms = ctx.saved_tensors
    # Rounded once, and without a float32 copy of u.
    return torch.mul(u, (grad_logps * norms[0]).unsqueeze(1), out=torch.empty_like(u)), *(None,) * 14


@first_derivative_only("linear_token_logps")
def _trainable_backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs
    into = grad_to_add_to(ctx, 1) if needs[1] and not ctx.makes_graph else None
    if into is None:
        grads = _backward_op(grad_logps, *ctx.saved_tensors, *ctx.options, *needs, ctx.tile, ctx.impl)
    else:
        hidden, weight, bias, labels, norms, p = ctx.saved_tensors
        options = LogitOptions(*ctx.options)
        grads = _gradients(grad_logps, hidden, weight, bias, labels, norms, p, options, needs, ctx.tile, ctx.impl, into)
        needs = needs[0], False, needs[2]
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * 12


_forward_op.register_autograd(_autograd, setup_context=_setup_context)
