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

from fastdpo.ops.dispatch import LogitOptions, row_kernels
from fastdpo.ops.linear_logps import check_linear, compute_dtype, make_head, tile_rows
from fastdpo.types import TokenStats

# (first pair, end pair, sums (2, pairs) of chosen and rejected log-probs, requiring grad) -> losses (pairs,)
PairLoss = Callable[[int, int, Tensor], Tensor]


def fused_pair_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sequence_ids: Tensor,
    tokens_per_pair: Sequence[int],
    pair_loss: PairLoss,
    options: LogitOptions,
    *,
    bias: Tensor | None = None,
    stats: bool = False,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, TokenStats | None]:
    """sum over pairs of pair_loss(log-probs of the pair), without logits of all tokens.

    Args:
        hidden: (N, D), the rows of pair 0 first, then those of pair 1, and so on.
        sequence_ids: (N,) in [0, 2B): chosen i is i, rejected i is B + i.
        tokens_per_pair: B host integers that add up to N.
        pair_loss: called once a chunk, under `torch.enable_grad`.

    Returns:
        loss (scalar, differentiable in hidden, weight, bias), losses (B,), logps (2B,), statistics or None.
    """
    check_linear(hidden, weight, labels, bias)
    dtype = compute_dtype(hidden)
    hidden = hidden.to(dtype)
    kernels = row_kernels(impl, hidden)
    tile = tile_rows(weight, dtype, memory_budget)
    loss, losses, logps, all_stats = FusedPairLossFunction.apply(
        hidden,
        weight,
        bias,
        labels.long(),
        sequence_ids,
        tuple(tokens_per_pair),
        pair_loss,
        options,
        stats,
        tile,
        kernels,
    )
    return loss, losses, logps, None if all_stats is None else TokenStats.from_rows(all_stats)


def chunk_pairs(tokens_per_pair: Sequence[int], tile: int) -> list[tuple[int, int]]:
    """[first, end) ranges of whole pairs with at most `tile` tokens each, of like size; a larger pair stands alone."""
    total = sum(tokens_per_pair)
    aim = -(-total // max(1, -(-total // tile)))  # as many chunks as the tile makes necessary, all alike
    chunks: list[tuple[int, int]] = []
    first, tokens = 0, 0
    for pair, count in enumerate(tokens_per_pair):
        if pair > first and (tokens >= aim or tokens + count > tile):
            chunks.append((first, pair))
            first, tokens = pair, 0
        tokens += count
    if first < len(tokens_per_pair):
        chunks.append((first, len(tokens_per_pair)))
    return chunks


class FusedPairLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, sequence_ids: Tensor,
        tokens_per_pair: tuple[int, ...], pair_loss: PairLoss, options: LogitOptions, stats: bool, tile: int,
        kernels: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        from fastdpo_kernels import linear_logprobs as kernel

        head = make_head(weight, bias, hidden.dtype, options, kernels)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_grad = needs_hidden or needs_weight or needs_bias
        grads = kernel.HeadGrads.zeros(head, needs_weight, needs_bias)
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        buffer = head.buffer(hidden, tile)
        num_pairs = len(tokens_per_pair)
        losses_parts, sums_parts, stats_parts = [], [], []
        start = 0
        for first, end in chunk_pairs(tokens_per_pair, tile):
            part = slice(start, start + sum(tokens_per_pair[first:end]))
            start = part.stop
            h, y = hidden[part], labels[part]
            fits = h.shape[0] <= tile
            if fits:
                x = head.logits(h, buffer)
                logps, lse, chunk_stats = kernels.token_logprobs_fwd(x, y, stats=stats, **head.options)
            else:  # one pair larger than the tile: its log-probs first, its tiles again for the gradient
                logps, lse, chunk_stats = kernel.fwd(h, y, head, tile=tile, stats=stats)
            # chosen i -> i - first, rejected B + i -> (end - first) + i - first
            ids = sequence_ids[part] - first
            ids = torch.where(ids >= num_pairs - first, ids - num_pairs + (end - first), ids)
            sums = logps.new_zeros(2 * (end - first)).index_add_(0, ids, logps)
            losses, grad_sums = _pair_gradient(pair_loss, first, end, sums, needs_grad)
            losses_parts.append(losses)
            sums_parts.append(sums.view(2, -1))
            stats_parts.append(chunk_stats)
            if not needs_grad:
                continue
            g = grad_sums[ids]
            dh = None if dhidden is None else dhidden[part]
            if fits:
                kernel.tile_bwd(kernel.to_gradient(x, y, lse, head), h, g, head, grads, dh)
            else:
                kernel.bwd(h, y, lse, g, head, grads, tile=tile, dhidden=dh)
        if losses_parts:
            losses, logps = torch.cat(losses_parts), torch.cat(sums_parts, dim=1).view(-1)
        else:
            losses = logps = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        all_stats = torch.cat(stats_parts, dim=1) if stats and stats_parts else None
        ctx.save_for_backward(dhidden, grads.weight, grads.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses, logps, *([] if all_stats is None else [all_stats]))
        return losses.sum(), losses, logps, all_stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Scaled where they stand: a second float32 copy of a head's gradient can be gigabytes. Autograd sees it,
        # so a second backward through the same graph raises instead of scaling twice.
        dhidden, dweight, dbias = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        if dweight is not None:
            dweight = dweight.to(ctx.dtypes[0])
        if dbias is not None:
            dbias = dbias.to(ctx.dtypes[1])
        return (dhidden, dweight, dbias, *[None] * 8)


def _pair_gradient(pair_loss: PairLoss, first: int, end: int, sums: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """losses (pairs,) and d sum(losses) / d sums, flat (2 * pairs,): chosen first, then rejected."""
    with torch.enable_grad():
        leaf = sums.view(2, -1).detach().requires_grad_(needs_grad)
        losses = pair_loss(first, end, leaf)
        if not needs_grad:
            return losses.detach(), sums
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad.reshape(-1)
