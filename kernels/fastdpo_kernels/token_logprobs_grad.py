"""Log-probabilities and their gradient over the logits, in Triton, in one pass: one read and one write.

With t = z log2(e) - n as in `row`, one anchor n for the row, and q of the label y set apart,

    e_j = 2^t_j,   T = sum_j e_j,   logp = t_y log 2 - log T
    q_j = e_j s_j,  q_y = (e_y - T) s_y      s_j = dz_j/dx_j over its value at x = 0
    d logp / d x_j = -(dz/dx at 0) q_j / T

q can be written over x as the row is read, before T is known: what it lacks is a factor of the whole row, which whoever
multiplies q applies to the other, small operand. The anchor is the maximum of the first block. Where a later one rises
above it by more than LIMIT, what is written so far is made smaller and the anchor moves. (Of 2,048 rows of English text
in SmolLM2-135M none rises above its first 2,048 columns by more than 10.2 nats.) A forward and a backward kernel would
read the row twice.

The maximum of a block is the one thing for which the threads meet in the loop; sums are each thread's own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.eager import lifted
from fastdpo_kernels.row import (
    DIVISION,
    FLOOR,
    LINEAR,
    LN_2,
    LOG2_E,
    POLYNOMIAL,
    THREADS,
    block_columns,
    bounded,
    edges,
    has_edges,
    load_block,
    load_one,
    loads,
    log2_z,
    log_prob,
    natural_z,
    num_warps,
    on_boundary,
    product_of_thread,
    relative_slope,
    split,
    sum_of_thread,
    transform_of,
)
from fastdpo_kernels.token_logprobs import shrink_sums, token_logprobs_bwd, token_logprobs_fwd

# In units of log2. The largest sum, that of e^2, is at most 4^LIMIT V, far from the largest float32; and the factor of
# a row is at least 2^-LIMIT / V, so that a gradient times it is far from the smallest.
LIMIT = tl.constexpr(24.0)


@triton.jit
def _rescale(body_x, end, factor, THREADS: tl.constexpr):
    """Multiplies the first `end` columns of a body by the factor."""
    tl.debug_barrier()  # another thread may have written them
    BLOCK: tl.constexpr = THREADS * (128 // body_x.dtype.element_ty.primitive_bitwidth)
    for start in range(0, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        q = tl.load(body_x + columns, mask=columns < end, other=0.0).to(tl.float32)
        tl.store(body_x + columns, (factor * q).to(body_x.dtype.element_ty), mask=columns < end)


@triton.jit
def _anchored(
    block_m, written, body_x, n, total, total_et, total_ee, inner, outer2, KIND: tl.constexpr, THREADS: tl.constexpr
):
    """The anchor n and the sums of each thread, which follow a block's maximum of x only where it is far above n.

    Then what was written, the first `written` columns of the body, is made smaller, too.
    """
    block_n = log2_z(bounded(block_m, inner, KIND), outer2, 0.0, KIND)
    if block_n > n + LIMIT:
        factor, total_et, total_ee = shrink_sums(n, block_n, total, total_et, total_ee)
        _rescale(body_x, written, factor, THREADS)
        total = factor * total
        n = block_n
    # All masked so far: -inf - -inf would be NaN.
    return n, tl.where(n == -float("inf"), 0.0, n), total, total_et, total_ee


@triton.jit
def _fold(
    body_x, start, body, m, n, total, total_z, total_et, total_ee, inner, outer2,
    KIND: tl.constexpr, FLIP: tl.constexpr, HAS_STATS: tl.constexpr, MASKED: tl.constexpr,
    THREADS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """The state with one more block, which begins at column `start` of the body and becomes q. As in `token_logprobs`,
    but the maximum m of x and the anchor n are the row's.
    """
    block = body_x + start
    x = load_block(block, body - start, THREADS, LOADS, MASKED, FLIP)
    columns = block_columns(LOADS * THREADS, x.shape[2])
    inside = tl.reshape(columns < body - start, x.shape)
    block_m = tl.max(tl.max(tl.max(x, axis=2), axis=0), axis=0)
    n, anchor, total, total_et, total_ee = _anchored(
        block_m, start, body_x, n, total, total_et, total_ee, inner, outer2, KIND, THREADS
    )
    b = bounded(x, inner, KIND)
    t = log2_z(b, outer2, anchor, KIND)
    if MASKED:
        t = tl.where(inside, t, -float("inf"))  # under a softcap x = -inf has a finite z
    e = tl.exp2(t)
    total += sum_of_thread(e)
    if HAS_STATS:
        m = tl.maximum(m, block_m)
        if KIND != LINEAR:
            x = t + anchor
        if MASKED:
            x = tl.where(inside, x, 0.0)
        total_z += sum_of_thread(x)
        total_et += product_of_thread(e, tl.maximum(t, FLOOR))
        total_ee += product_of_thread(e, e)
    q = tl.reshape((e * relative_slope(b, KIND)).to(block.dtype.element_ty), columns.shape)
    if MASKED:
        tl.store(block + columns, q, mask=columns < body - start)
    else:
        tl.store(block + columns, q)
    return m, n, total, total_z, total_et, total_ee


@triton.jit(
    do_not_specialize=["row_stride", "n_rows", "V", "ignore_index"],
    do_not_specialize_on_alignment=["logits", "labels", "logps", "scales", "stats"],
)
def _token_logprobs_fwd_grad_kernel(
    logits,  # (N, V)
    labels,  # (N,)
    logps,  # (N,)
    scales,  # (N,)
    stats,  # (4, N) or None
    row_stride,
    n_rows,
    V,
    ignore_index,
    inner,
    outer,
    outer2,
    slope,
    KIND: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    lead, body = split(logits, V, HAS_EDGES)
    body_x = on_boundary(logits + lead)
    BLOCK: tl.constexpr = LOADS * THREADS * (128 // logits.dtype.element_ty.primitive_bitwidth)
    label = tl.load(labels + row)
    if label == ignore_index:
        zeros = tl.zeros((BLOCK,), logits.dtype.element_ty)
        for start in range(0, body, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(body_x + columns, zeros, mask=columns < body)
        if HAS_EDGES:
            columns, inside = edges(logits, lead, body, V)
            tl.store(logits + columns, 0.0, mask=inside)
        tl.store(logps + row, 0.0)
        tl.store(scales + row, 0.0)
        if HAS_STATS:
            for k in tl.static_range(4):
                tl.store(stats + k * n_rows + row, 0.0)
        return

    in_range = (label >= 0) & (label < V)
    label_b = bounded(load_one(logits, label, in_range, FLIP), inner, KIND)
    m = tl.full((), -float("inf"), tl.float32)
    n = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    total_z = tl.zeros((THREADS,), tl.float32)
    total_et = tl.zeros((THREADS,), tl.float32)
    total_ee = tl.zeros((THREADS,), tl.float32)
    whole = body // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        m, n, total, total_z, total_et, total_ee = _fold(
            body_x, start, body, m, n, total, total_z, total_et, total_ee, inner, outer2,
            KIND, FLIP, HAS_STATS, False, THREADS, LOADS,
        )  # fmt: skip
    if whole < body:
        m, n, total, total_z, total_et, total_ee = _fold(
            body_x, whole, body, m, n, total, total_z, total_et, total_ee, inner, outer2,
            KIND, FLIP, HAS_STATS, True, THREADS, LOADS,
        )  # fmt: skip
    if HAS_EDGES:
        columns, inside = edges(logits, lead, body, V)
        edge_x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
        # Every warp holds all of these few columns, and one of them stores them. Without a barrier a late warp would
        # read what was stored, and could take the branch of the rescaling alone, whose barrier is for all.
        tl.debug_barrier()
        edge_x = tl.where(inside, 0.0 - edge_x if FLIP else edge_x, -float("inf"))
        edge_m = tl.max(edge_x, axis=0)
        m = tl.maximum(m, edge_m)
        n, anchor, total, total_et, total_ee = _anchored(
            edge_m, body, body_x, n, total, total_et, total_ee, inner, outer2, KIND, THREADS
        )
        edge_b = bounded(edge_x, inner, KIND)
        edge_t = tl.where(inside, log2_z(edge_b, outer2, anchor, KIND), -float("inf"))
        edge_e = tl.exp2(edge_t)
        edge_q = (edge_e * relative_slope(edge_b, KIND)).to(logits.dtype.element_ty)
        tl.store(logits + columns, edge_q, mask=inside)

    sum_e = tl.sum(total, axis=0)
    sum_z = tl.sum(total_z, axis=0)
    sum_et = tl.sum(total_et, axis=0)
    sum_ee = tl.sum(total_ee, axis=0)
    if HAS_EDGES:
        sum_e += tl.sum(edge_e, axis=0)
        if HAS_STATS:
            sum_z += tl.sum(tl.where(inside, edge_x if KIND == LINEAR else edge_t + anchor, 0.0), axis=0)
            sum_et += tl.sum(edge_e * tl.maximum(edge_t, FLOOR), axis=0)
            sum_ee += tl.sum(edge_e * edge_e, axis=0)
    label_t = log2_z(label_b, outer2, tl.where(n == -float("inf"), 0.0, n), KIND)
    log_sum = tl.log(sum_e)
    label_z = natural_z(label_b, outer, KIND)
    tl.store(logps + row, log_prob(label_t, label_z, log_sum))
    tl.store(scales + row, tl.where(in_range, -slope / sum_e, float("nan")))
    tl.debug_barrier()  # another thread has written the label's column
    label_q = (tl.exp2(label_t) - sum_e) * relative_slope(label_b, KIND)
    tl.store(logits + label, label_q.to(logits.dtype.element_ty), mask=in_range)
    if HAS_STATS:
        row_z = natural_z(bounded(m, inner, KIND), outer, KIND)
        tl.store(stats + row, log_sum - sum_et / sum_e * LN_2)
        tl.store(stats + n_rows + row, sum_z / V * (outer if KIND == LINEAR else LN_2))
        tl.store(stats + 2 * n_rows + row, (label_z >= row_z).to(tl.float32))
        tl.store(stats + 3 * n_rows + row, tl.log(sum_ee) - 2.0 * log_sum)


def token_logprobs_fwd_grad(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logps (N,), scale (N,) and stats of `token_logprobs_fwd`; logits become q, of dlogp/dlogits = scale[:, None] * q.

    logits (N, V) as in `token_logprobs_fwd`. Ignored rows are not read and become zeros; where the label is outside
    [0, V), logp is NaN, and scale or q. The range of float16 is too small for rows that lack their factor, and the
    backward kernel writes them, lifted where the token is almost certain (`eager.lifted`).
    """
    n, v = logits.shape
    assert v > 0 and (v == 1 or logits.stride(1) == 1) and labels.shape == (n,)
    if logits.dtype == torch.float16:
        options: dict[str, Any] = {
            "ignore_index": ignore_index, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale
        }  # fmt: skip
        logps, norms, statistics = token_logprobs_fwd(logits, labels, stats=stats, **options)
        lift = lifted(logps)
        token_logprobs_bwd(logits, labels, norms, lift, out=logits, **options)
        return logps, 1.0 / lift, statistics
    assert logits.dtype in (torch.bfloat16, torch.float32), logits.dtype
    logps = torch.empty(n, dtype=torch.float32, device=logits.device)
    scales = torch.empty_like(logps)
    statistics = torch.empty(4, n, dtype=torch.float32, device=logits.device) if stats else None
    if n > 0:
        transform = transform_of(logits.dtype, temperature, softcap, logit_scale)
        heavy = POLYNOMIAL.value == transform.KIND or (DIVISION.value == transform.KIND and stats)
        with torch.cuda.device_of(logits):
            _token_logprobs_fwd_grad_kernel[(n,)](
                logits,
                labels.contiguous(),
                logps,
                scales,
                statistics,
                logits.stride(0),
                n,
                v,
                ignore_index,
                transform.inner,
                transform.outer,
                transform.outer * LOG2_E.value,
                transform.slope,
                KIND=transform.KIND,
                FLIP=transform.FLIP,
                HAS_STATS=stats,
                HAS_EDGES=has_edges(logits),
                THREADS=THREADS,
                LOADS=loads(logits.dtype, heavy=heavy),
                num_warps=num_warps(),
            )
    return logps, scales, statistics
