"""A preference loss from hidden states whose gradient is formed in the forward pass, a chunk of pairs at a time.

A loss that is a sum over pairs needs, of one pair, only the log-probs of that pair. So once a chunk of whole pairs has
its log-probs, dL/dlogp of its tokens is known, and the tile of logits, still in memory, becomes the gradient at once:
no second product for the logits. 6NDV FLOPs in all, where a per-token API that forms its tiles again needs 8NDV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.ops.budget import rows_within
from fastdpo.ops.dispatch import LogitOptions, row_kernels
from fastdpo.ops.linear_logps import make_head, needed_gradients
from fastdpo.types import TokenStats
from fastdpo_kernels import linear_logprobs as kernel

# (first pair, end pair, sums (2, pairs) of chosen and rejected log-probs, requiring grad) -> losses (pairs,)
PairLoss = Callable[[int, int, Tensor], Tensor]


def is_fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, memory_budget: int) -> bool:
    """Whether forming the gradient in the forward saves something over `linear_token_logps`.

    It does for a trainable head whose logits do not all fit. torch.compile cannot trace a gradient inside a forward.
    """
    _, needs_weight, needs_bias = needed_gradients(hidden, weight, bias)
    if torch.compiler.is_compiling() or not (needs_weight or needs_bias):
        return False
    return hidden.shape[0] > rows_within(memory_budget, weight.shape[0], dtype)


def fused_pair_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sequence_ids: Tensor,
    tokens_per_pair: Sequence[int],
    pair_loss: PairLoss,
    options: LogitOptions,
    *,
    memory_budget: int,
    bias: Tensor | None = None,
    stats: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, TokenStats | None]:
    """sum over pairs of pair_loss(log-probs of the pair), without logits of all tokens.

    Args:
        hidden: (N, D) in the dtype of the products, the rows of pair 0 first, then those of pair 1, and so on.
        sequence_ids: (N,) in [0, 2B): chosen i is i, rejected i is B + i.
        tokens_per_pair: B host integers that add up to N.
        pair_loss: called once a chunk, under `torch.enable_grad`.

    Returns:
        loss (scalar, differentiable in hidden, weight, bias), losses (B,), logps (2B,), statistics or None.
    """
    loss, losses, logps, all_stats = FusedPairLossFunction.apply(
        hidden, weight, bias, labels.long(), sequence_ids, tuple(tokens_per_pair), pair_loss, options, stats,
        memory_budget, row_kernels(impl, hidden),
    )  # fmt: skip
    return loss, losses, logps, TokenStats.from_rows(all_stats) if stats else None


def chunk_rows(tokens_per_pair: Sequence[int], tile: int) -> list[tuple[int, int, slice]]:
    """(first pair, end pair, their rows) of chunks of at most `tile` rows, of like size; a larger pair stands alone."""
    total = sum(tokens_per_pair)
    aim = -(-total // max(1, -(-total // tile)))  # as many chunks as the tile makes necessary, all alike
    chunks: list[tuple[int, int, slice]] = []
    first, start, stop = 0, 0, 0
    for pair, count in enumerate(tokens_per_pair):
        if pair > first and (stop - start >= aim or stop - start + count > tile):
            chunks.append((first, pair, slice(start, stop)))
            first, start = pair, stop
        stop += count
    if first < len(tokens_per_pair):
        chunks.append((first, len(tokens_per_pair), slice(start, stop)))
    return chunks


class FusedPairLossFunction(torch.autograd.Function):
    """For a trainable head; the gradients of all tensors are formed in the forward, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, sequence_ids: Tensor,
        tokens_per_pair: tuple[int, ...], pair_loss: PairLoss, options: LogitOptions, stats: bool, memory_budget: int,
        kernels: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = make_head(weight, bias, hidden.dtype, options, kernels)
        tile = rows_within(memory_budget, weight.shape[0], hidden.dtype)
        chunks, num_pairs = chunk_rows(tokens_per_pair, tile), len(tokens_per_pair)
        # A pair larger than the tile stands alone: log-probs first, and its tiles again for the gradient.
        count = sum(kernel.tile_count(rows.stop - rows.start, 0, tile) for _, _, rows in chunks)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grads = kernel.HeadGrads(head, weight=needs_weight, bias=needs_bias, tiles=count)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        results = kernel.RowResults(hidden, stats)
        losses, sums = results.logps.new_empty(num_pairs), results.logps.new_empty(2, num_pairs)
        token_grads = torch.empty_like(results.logps)  # (N,) dL/dlogp
        buffer = head.buffer(min(tile, max((rows.stop - rows.start for _, _, rows in chunks), default=0)))
        for first, end, rows in chunks:
            n = rows.stop - rows.start
            if n <= tile:
                p = head.logits(hidden[rows], buffer[:n])
                results.forward_to_gradient(rows, p, labels[rows], head)
            else:
                kernel.fwd(hidden, labels, head, results, buffer, start=rows.start, end=rows.stop)
            # chosen i -> i - first, rejected B + i -> (end - first) + i - first
            ids = sequence_ids[rows] - first
            ids = torch.where(ids >= num_pairs - first, ids - num_pairs + (end - first), ids)
            chunk_sums = sums.new_zeros(2 * (end - first)).index_add_(0, ids, results.logps[rows]).view(2, -1)
            losses[first:end], grad_sums = _pair_gradient(pair_loss, first, end, chunk_sums)
            sums[:, first:end] = chunk_sums
            token_grads[rows] = grad_sums[ids]
            if n <= tile:
                token_grads[rows] *= results.scale[rows]
                kernel.tile_bwd(rows, p, hidden, token_grads, head, grads, dhidden)
            else:
                kernel.bwd(hidden, labels, results.norms, token_grads, head, grads, dhidden, buffer, start=rows.start,
                           end=rows.stop)  # fmt: skip
        ctx.save_for_backward(dhidden, grads.weight, grads.bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        logps = sums.view(-1)
        ctx.mark_non_differentiable(losses, logps, results.stats)
        return losses.sum(), losses, logps, results.stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # In place where the dtype is already that of the tensor: a second copy of a head's gradient can be gigabytes.
        # Autograd sees the change, so a second backward through the same graph raises instead of scaling twice.
        scaled = []
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if grad is None or grad.dtype == dtype:
                scaled.append(None if grad is None else grad.mul_(grad_loss))
            else:  # scaled and cast in one pass
                scaled.append(torch.mul(grad, grad_loss, out=torch.empty_like(grad, dtype=dtype)))
        return (*scaled, *[None] * 8)


def _pair_gradient(pair_loss: PairLoss, first: int, end: int, sums: Tensor) -> tuple[Tensor, Tensor]:
    """losses (pairs,) and d sum(losses) / d sums, flat (2 * pairs,): chosen first, then rejected."""
    with torch.enable_grad():
        leaf = sums.detach().requires_grad_()
        losses = pair_loss(first, end, leaf)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad.reshape(-1)
