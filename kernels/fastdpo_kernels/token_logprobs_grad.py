"""Log-probabilities and their gradient over the logits, in Triton, in one pass: one read and one write.

With z, m and S as in `token_logprobs`, any anchor a in place of m, and q of the label y set apart,

    e_j = exp(z_j - a),   T = sum_j e_j,   logp = (z_y - a) - log T
    q_j = e_j dz_j/dx_j,  q_y = (e_y - T) dz_y/dx_y
    d logp / d x_j = -q_j / T

q can be written over x as the row is read, before T is known: what it lacks is a factor of the whole row, which whoever
multiplies q applies to the other, small operand. The anchor is the maximum of the first block. Where a later one rises
above it by more than LIMIT, what is written so far is made smaller and the anchor moves. (Of 2,048 rows of English text
in SmolLM2-135M none rises above its first block's maximum by more than 10.2.) A forward and a backward kernel would
read the row twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.eager import lifted
from fastdpo_kernels.token_logprobs import (
    BACKWARD_BLOCK,
    FLOOR,
    NUM_WARPS,
    block,
    edges,
    factors,
    has_edges,
    on_boundary,
    split,
    token_logprobs_bwd,
    token_logprobs_fwd,
    transform,
)

# A block as in the backward, not measured, for no GPU has run it yet: of 2048 columns a thread holds 16, at 40 to 71
# registers (sm_90). With 4096 it took 60 to 139, and several variants spilled.

# The largest sum, that of e^2, is at most exp(2 LIMIT) V, far from the largest float32; and the factor of a row is at
# least exp(-LIMIT) / V, so that a gradient times it is far from the smallest.
LIMIT = tl.constexpr(16.0)


@triton.jit
def _slope(z, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """dz/dx, of z: tanh need not be kept over the reductions of a block."""
    if HAS_SOFTCAP:
        t = z / outer
        return outer * inner * (1.0 - t * t)
    else:
        return outer


@triton.jit
def _rescale(body_x, end, factor, BLOCK_V: tl.constexpr):
    """Multiplies the first `end` columns of a body by the factor."""
    tl.debug_barrier()  # another thread may have written them
    for start in range(0, end, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        q = tl.load(body_x + columns, mask=columns < end, other=0.0).to(tl.float32)
        tl.store(body_x + columns, (factor * q).to(body_x.dtype.element_ty), mask=columns < end)


@triton.jit
def _fold_anchored(
    z,
    inside,
    written,
    body_x,
    m,
    anchor,
    total,
    total_z,
    total_ed,
    total_ee,
    HAS_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """As `_fold`, and exp(z - anchor). The anchor follows the maximum only where it falls behind by more than LIMIT.

    Then what was written, the first `written` columns of the body, is made smaller, too.
    """
    z = tl.where(inside, z, -float("inf"))
    block_m = tl.max(z, axis=0)
    if block_m > anchor + LIMIT:
        factor = tl.exp(anchor - block_m)
        _rescale(body_x, written, factor, BLOCK_V)
        if HAS_STATS:
            total_ed = factor * (total_ed + total * tl.maximum(anchor - block_m, FLOOR))
            total_ee = factor * factor * total_ee
        total = factor * total
        anchor = block_m
    d = z - tl.where(anchor == -float("inf"), 0.0, anchor)  # all masked so far: -inf - -inf would be NaN
    e = tl.exp(d)
    if HAS_STATS:
        total_z += tl.sum(tl.where(inside, z, 0.0), axis=0)
        total_ed += tl.sum(e * tl.maximum(d, FLOOR), axis=0)
        total_ee += tl.sum(e * e, axis=0)
    total += tl.sum(e, axis=0)
    return e, tl.maximum(m, block_m), anchor, total, total_z, total_ed, total_ee


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
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    lead, body = split(logits, V, HAS_EDGES)
    body_x = on_boundary(logits + lead)
    label = tl.load(labels + row)
    if label == ignore_index:
        zeros = tl.zeros((BLOCK_V,), logits.dtype.element_ty)
        for start in range(0, body, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
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
    label_x = tl.load(logits + label, mask=in_range, other=float("nan"))
    label_z = transform(label_x.to(tl.float32), inner, outer, HAS_SOFTCAP)
    m = tl.full((), -float("inf"), tl.float32)
    anchor = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    total_z = tl.zeros((), tl.float32)
    total_ed = tl.zeros((), tl.float32)
    total_ee = tl.zeros((), tl.float32)
    for start in range(0, body, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < body
        x = tl.load(body_x + columns, mask=inside, other=0.0)  # (BLOCK_V,)
        z = transform(x.to(tl.float32), inner, outer, HAS_SOFTCAP)
        e, m, anchor, total, total_z, total_ed, total_ee = _fold_anchored(
            z, inside, start, body_x, m, anchor, total, total_z, total_ed, total_ee, HAS_STATS, BLOCK_V
        )
        tl.store(body_x + columns, (_slope(z, inner, outer, HAS_SOFTCAP) * e).to(logits.dtype.element_ty), mask=inside)
    if HAS_EDGES:
        columns, inside = edges(logits, lead, body, V)
        x = tl.load(logits + columns, mask=inside, other=0.0)
        # Every warp holds all of these few columns, and one of them stores them. Without a barrier a late warp would
        # read what was stored, and could take the branch of the rescaling alone, whose barrier is for all.
        tl.debug_barrier()
        z = transform(x.to(tl.float32), inner, outer, HAS_SOFTCAP)
        e, m, anchor, total, total_z, total_ed, total_ee = _fold_anchored(
            z, inside, body, body_x, m, anchor, total, total_z, total_ed, total_ee, HAS_STATS, BLOCK_V
        )
        tl.store(logits + columns, (_slope(z, inner, outer, HAS_SOFTCAP) * e).to(logits.dtype.element_ty), mask=inside)

    d = label_z - tl.where(anchor == -float("inf"), 0.0, anchor)
    log_total = tl.log(total)
    tl.store(logps + row, d - log_total)
    tl.store(scales + row, tl.where(in_range, -1.0 / total, float("nan")))
    tl.debug_barrier()  # another thread has written the label's column
    label_q = (tl.exp(d) - total) * _slope(label_z, inner, outer, HAS_SOFTCAP)
    tl.store(logits + label, label_q.to(logits.dtype.element_ty), mask=in_range)
    if HAS_STATS:
        tl.store(stats + row, log_total - total_ed / total)
        tl.store(stats + n_rows + row, total_z / V)
        tl.store(stats + 2 * n_rows + row, (label_z >= m).to(tl.float32))
        tl.store(stats + 3 * n_rows + row, tl.log(total_ee) - 2.0 * log_total)


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
        inner, outer = factors(temperature, softcap, logit_scale)
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
                inner,
                outer,
                HAS_SOFTCAP=softcap is not None,
                HAS_STATS=stats,
                HAS_EDGES=has_edges(logits),
                BLOCK_V=block(v, BACKWARD_BLOCK),
                num_warps=NUM_WARPS,
            )
    return logps, scales, statistics
