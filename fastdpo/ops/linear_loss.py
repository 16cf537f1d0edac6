"""A preference loss from hidden states whose gradient is formed in the forward pass, a chunk of groups at a time.

A group is what one loss is a function of: a pair, a list of completions, a single answer. A loss that is a sum over
groups needs, of one group, only the sums of its log-probs. So once a chunk of whole groups has its log-probs, dL/dlogp
of its tokens is known, and the tile of logits, still in memory, becomes the gradient at once: no second product for
the logits. 6NDV FLOPs in all, where a per-token API that forms its tiles again needs 8NDV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.budget import named_if_out_of_memory, rows_within
from fastdpo.ops.dispatch import LogitOptions, row_kernels
from fastdpo.ops.into_grad import GradAhead, add_scaled, grad_to_add_to
from fastdpo.ops.library import first_derivative_only, in_transform, refuse_transforms
from fastdpo.ops.linear_logps import make_head, needed_gradients
from fastdpo.ops.sum_by_id import sum_by_id
from fastdpo.types import TokenStats
from fastdpo_kernels import linear_logprobs as kernel
from fastdpo_kernels.eager import lifted

# (first group, end group, the slots' sums of log-probs, requiring grad; the same of log sum_v p_v^2, where asked for)
# -> losses (groups,)
GroupLoss = Callable[[int, int, Tensor, Tensor | None], Tensor]


def is_fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, memory_budget: int) -> bool:
    """Whether forming the gradient in the forward saves something over `linear_token_logps`.

    It does for a trainable head whose logits do not all fit. Neither torch.compile nor torch.func.vmap can follow a
    gradient inside a forward.
    """
    _, needs_weight, needs_bias = needed_gradients(hidden, weight, bias)
    if torch.compiler.is_compiling() or in_transform() or not (needs_weight or needs_bias):
        return False
    return hidden.shape[0] > rows_within(memory_budget, weight.shape[0], dtype)


def fused_group_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    slot_ids: Tensor,
    rows_per_group: Sequence[int],
    slots_per_group: Sequence[int],
    group_loss: GroupLoss,
    options: LogitOptions,
    *,
    memory_budget: int,
    bias: Tensor | None = None,
    stats: bool = False,
    sum_p2: bool = False,
    ahead: GradAhead | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, TokenStats | None]:
    """sum over groups of group_loss(sums of the group's log-probs by slot), without logits of all tokens.

    Args:
        hidden: (N, D) in the dtype of the products, the rows of group 0 first, then those of group 1, and so on.
        slot_ids: (N,) where each row's log-prob is added: slots are numbered group by group.
        rows_per_group: host integers that add up to N.
        slots_per_group: host integers; their sum is the number of slots.
        group_loss: called once a chunk, under `torch.enable_grad`.
        sum_p2: whether it is to have the sums of log sum_v p_v^2; needs `stats`.
        ahead: adds the weight's gradient to `.grad` at once, as for a backward that brings its scale.

    Returns:
        loss (scalar, differentiable in hidden, weight, bias), losses (groups,), sums (slots,) float64, statistics or
        None.
    """
    refuse_transforms("linear_loss", hidden, weight, bias)
    tile = rows_within(memory_budget, weight.shape[0], hidden.dtype)
    with named_if_out_of_memory(tile, weight.shape[0], hidden.dtype):
        loss, losses, sums, all_stats = FusedGroupLossFunction.apply(
            hidden, weight, bias, labels.long(), slot_ids, tuple(rows_per_group), tuple(slots_per_group), group_loss,
            options, stats, sum_p2, tile, row_kernels(impl, hidden), ahead,
        )  # fmt: skip
    return loss, losses, sums, TokenStats.from_rows(all_stats) if stats else None


def chunk_rows(rows_per_group: Sequence[int], tile: int) -> list[tuple[int, int, slice]]:
    """(first group, end group, their rows) of chunks of at most `tile` rows, alike in size; a larger one is alone."""
    total = sum(rows_per_group)
    aim = -(-total // max(1, -(-total // tile)))  # as many chunks as the tile makes necessary, all alike
    chunks: list[tuple[int, int, slice]] = []
    first, start, stop = 0, 0, 0
    for group, count in enumerate(rows_per_group):
        if group > first and (stop - start >= aim or stop - start + count > tile):
            chunks.append((first, group, slice(start, stop)))
            first, start = group, stop
        stop += count
    if first < len(rows_per_group):
        chunks.append((first, len(rows_per_group), slice(start, stop)))
    return chunks


class FusedGroupLossFunction(torch.autograd.Function):
    """For a trainable head; the gradients of all tensors are formed in the forward, and scaled in the backward.

    A loss scale, which keeps small gradients within float16, comes with the backward. Until then the gradient of the
    hidden states is kept apart from that of the tokens, and the head's is summed as `HeadGrads` does it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, slot_ids: Tensor,
        rows_per_group: tuple[int, ...], slots_per_group: tuple[int, ...], group_loss: GroupLoss,
        options: LogitOptions, stats: bool, sum_p2: bool, tile: int, kernels: Any, ahead: GradAhead | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = make_head(weight, bias, hidden.dtype, options, kernels)
        chunks, slot_starts = chunk_rows(rows_per_group, tile), [0, *accumulate(slots_per_group)]
        # A group larger than the tile stands alone: log-probs first, and its tiles again for the gradient.
        count = sum(kernel.tile_count(rows.stop - rows.start, 0, tile) for _, _, rows in chunks)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grads = kernel.HeadGrads(
            head, weight=needs_weight, bias=needs_bias, tiles=count, before_scale=True,
            weight_into=None if ahead is None else ahead.grad,
        )  # fmt: skip
        u = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None  # dlogp/dhidden
        results = kernel.RowResults(hidden, stats)
        losses = results.logps.new_empty(len(rows_per_group))
        sums = results.logps.new_empty(slot_starts[-1], dtype=torch.float64)
        token_grads = torch.empty_like(results.logps)  # (N,) dL/dlogp
        buffer = head.buffer(min(tile, max((rows.stop - rows.start for _, _, rows in chunks), default=0)))
        for first, end, rows in chunks:
            n = rows.stop - rows.start
            if n <= tile:
                p = head.logits(hidden[rows], buffer[:n])
                results.forward_to_gradient(rows, p, labels[rows], head)
            else:
                kernel.fwd(hidden, labels, head, results, buffer, start=rows.start, end=rows.stop)
            slots, ids = slice(slot_starts[first], slot_starts[end]), slot_ids[rows] - slot_starts[first]
            sums[slots] = sum_by_id(results.logps[rows], ids, slots.stop - slots.start)
            part_p2 = None
            if sum_p2:
                part_p2 = sum_by_id(results.stats[3, rows], ids, slots.stop - slots.start)
            losses[first:end], grad_sums = _group_gradient(group_loss, first, end, sums[slots], part_p2)
            token_grads[rows] = grad_sums[ids]
            lift = None
            if n <= tile:
                token_grads[rows] *= results.scale[rows]
            elif hidden.dtype == torch.float16:
                lift = lifted(results.logps)
                token_grads[rows] /= lift[rows]
            grads.make_room(token_grads[rows])
            of_head = token_grads if ahead is None else token_grads * ahead.scale
            if n <= tile:
                kernel.tile_bwd(rows, p, hidden, of_head, head, grads, u, scaled=False)
            else:
                kernel.bwd(hidden, labels, results.norms, of_head, head, grads, u, buffer, lift=lift,
                           start=rows.start, end=rows.stop, scaled=False)  # fmt: skip
        ctx.save_for_backward(u)
        # Not among what hooks may take for activations, and carry to the host and back.
        ctx.head_grads, ctx.ahead = [grads.weight, grads.bias], ahead
        if ahead is not None:
            ahead.added()
        ctx.token_grads, ctx.lacking = token_grads, grads.lacking()
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses, sums, results.stats)
        return losses.sum(), losses, sums, results.stats

    @staticmethod
    @first_derivative_only("linear_loss", connected=False)
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # In place where the dtype is already that of the tensor: a second copy of a head's gradient can be gigabytes.
        head_grads, ctx.head_grads = ctx.head_grads, None
        if head_grads is None:
            raise RuntimeError(
                "linear_loss formed its gradient in the forward pass, and a backward has had it; call linear_loss "
                "again for another."
            )
        (u,) = ctx.saved_tensors
        scaled = [None if u is None else u.mul_((ctx.token_grads * grad_loss).unsqueeze(1))]
        if ctx.ahead is not None:
            ctx.ahead.settle(grad_loss)
            of_bias = head_grads[1]
            return scaled[0], None, None if of_bias is None else of_bias.to(ctx.dtypes[1]), *[None] * 11
        grad_loss = grad_loss * ctx.lacking
        into = None if head_grads[0] is None else grad_to_add_to(ctx, 1)
        if into is not None:
            add_scaled(into, head_grads[0], grad_loss)
            head_grads[0] = None
        for grad, dtype in zip(head_grads, ctx.dtypes, strict=True):
            if grad is None or grad.dtype == dtype:
                scaled.append(None if grad is None else grad.mul_(grad_loss))
            else:  # scaled and cast in one pass
                scaled.append(torch.mul(grad, grad_loss, out=torch.empty_like(grad, dtype=dtype)))
        return (*scaled, *[None] * 11)


def _group_gradient(
    group_loss: GroupLoss, first: int, end: int, sums: Tensor, sums_p2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """losses (groups,) and d sum(losses) / d sums, (slots,)."""
    # With hooks of its own: a checkpoint around it would run all again to give back what is saved here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        leaf = sums.detach().requires_grad_()
        losses = group_loss(first, end, leaf, sums_p2)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def _itself(tensor: Tensor) -> Tensor:
    return tensor
