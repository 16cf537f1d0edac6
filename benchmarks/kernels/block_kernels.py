"""The row kernels before each thread had sums of its own, kept as a contestant until a GPU has decided.

Their state is the row's: every block of columns ends in reductions over the whole program, with barriers. The functions
are those of `fastdpo_kernels.token_logprobs` and `token_logprobs_grad`, with the same arguments and results.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.eager import lifted
from fastdpo_kernels.row import edges, has_edges, on_boundary, split

FORWARD_BLOCK = 4096
BACKWARD_BLOCK = 2048
NUM_WARPS = 4

FLOOR = tl.constexpr(-1000.0)


@triton.jit
def _tanh(y):
    """tanh(y) in float32 to about 2 ulp; libdevice is absent on some backends and in the interpreter."""
    e = tl.exp(-2.0 * tl.abs(y))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(y < 0.0, -far, far)
    # 1 - e cancels for small y: there a minimax polynomial in y^2, relative error 5e-9 on |y| < 0.625.
    u = y * y
    p = -0.0057049864 * u + 0.0206390861
    p = p * u - 0.0537397154
    p = p * u + 0.133314416
    p = p * u - 0.333332807
    near = y + y * (u * p)
    return tl.where(tl.abs(y) < 0.625, near, far)


@triton.jit
def transform(x, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """z of raw logits: outer * tanh(inner * x), or outer * x."""
    if HAS_SOFTCAP:
        x = _tanh(inner * x)
    return outer * x


@triton.jit
def _fold(
    x, inside, m, total, total_z, total_ed, total_ee, inner, outer, HAS_SOFTCAP: tl.constexpr, HAS_STATS: tl.constexpr
):
    """The maximum m of z, sum e, sum z, sum e (z - m) and sum e^2 with one more block x, where e = exp(z - m)."""
    z = tl.where(inside, transform(x.to(tl.float32), inner, outer, HAS_SOFTCAP), -float("inf"))
    new_m = tl.maximum(m, tl.max(z, axis=0))
    anchor = tl.where(new_m == -float("inf"), 0.0, new_m)  # all masked so far: -inf - -inf would be NaN
    d = z - anchor
    e = tl.exp(d)
    shrink = tl.exp(m - anchor)
    if HAS_STATS:
        total_z += tl.sum(tl.where(inside, z, 0.0), axis=0)
        moved = tl.maximum(m - anchor, FLOOR)
        total_ed = shrink * (total_ed + total * moved) + tl.sum(e * tl.maximum(d, FLOOR), axis=0)
        total_ee = shrink * shrink * total_ee + tl.sum(e * e, axis=0)
    total = shrink * total + tl.sum(e, axis=0)
    return new_m, total, total_z, total_ed, total_ee


@triton.jit(
    do_not_specialize=["row_stride", "n_rows", "V", "ignore_index"],
    do_not_specialize_on_alignment=["logits", "labels", "logps", "norms", "stats"],
)
def _token_logprobs_fwd_kernel(
    logits,  # (N, V)
    labels,  # (N,)
    logps,  # (N,)
    norms,  # (2, N) m and log S
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
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(logps + row, 0.0)
        tl.store(norms + row, 0.0)
        tl.store(norms + n_rows + row, 0.0)
        if HAS_STATS:
            for k in tl.static_range(4):
                tl.store(stats + k * n_rows + row, 0.0)
        return

    logits += row * row_stride
    # An out-of-range label reads nothing, and its NaN becomes the log-prob.
    label_x = tl.load(logits + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    label_z = transform(label_x, inner, outer, HAS_SOFTCAP)

    m = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    total_z = tl.zeros((), tl.float32)
    total_ed = tl.zeros((), tl.float32)
    total_ee = tl.zeros((), tl.float32)
    lead, body = split(logits, V, HAS_EDGES)
    body_x = on_boundary(logits + lead)
    for start in range(0, body, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < body
        x = tl.load(body_x + columns, mask=inside, other=0.0)  # (BLOCK_V,)
        m, total, total_z, total_ed, total_ee = _fold(
            x, inside, m, total, total_z, total_ed, total_ee, inner, outer, HAS_SOFTCAP, HAS_STATS
        )
    if HAS_EDGES:  # after the body, which has brought their lines into the caches
        columns, inside = edges(logits, lead, body, V)
        x = tl.load(logits + columns, mask=inside, other=0.0)
        m, total, total_z, total_ed, total_ee = _fold(
            x, inside, m, total, total_z, total_ed, total_ee, inner, outer, HAS_SOFTCAP, HAS_STATS
        )

    anchor = tl.where(m == -float("inf"), 0.0, m)
    log_total = tl.log(total)
    # m and log S apart: their sum would be rounded at the size of m, and logp and gradient with it.
    tl.store(logps + row, (label_z - anchor) - log_total)
    tl.store(norms + row, anchor)
    tl.store(norms + n_rows + row, log_total)
    if HAS_STATS:
        tl.store(stats + row, log_total - total_ed / total)
        tl.store(stats + n_rows + row, total_z / V)
        tl.store(stats + 2 * n_rows + row, (label_z >= m).to(tl.float32))
        tl.store(stats + 3 * n_rows + row, tl.log(total_ee) - 2.0 * log_total)


@triton.jit
def _gradient(x, is_label, m, grad, share, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """(grad * onehot - share * exp(z - m)) * dz/dx of a block x."""
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        t = _tanh(inner * x)
        z = outer * t
        slope = outer * inner * (1.0 - t * t)
    else:
        z = outer * x
        slope = outer
    return (tl.where(is_label, grad, 0.0) - share * tl.exp(z - m)) * slope


@triton.jit(
    do_not_specialize=["row_stride", "out_row_stride", "n_rows", "V", "ignore_index"],
    do_not_specialize_on_alignment=["logits", "labels", "norms", "grad_logps", "out"],
)
def _token_logprobs_bwd_kernel(
    logits,  # (N, V)
    labels,  # (N,)
    norms,  # (2, N)
    grad_logps,  # (N,)
    out,  # (N, V), may be logits
    row_stride,
    out_row_stride,
    n_rows,
    V,
    ignore_index,
    inner,
    outer,
    HAS_SOFTCAP: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    ALIGNED_ALIKE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    out += row * out_row_stride
    # Split where `out` has its boundaries: narrow loads of a line that another load brought come from the L1 cache,
    # narrow stores would each go on to L2.
    lead, body = split(out, V, HAS_EDGES)
    body_out = on_boundary(out + lead)
    label = tl.load(labels + row)
    if label == ignore_index:
        zeros = tl.zeros((BLOCK_V,), out.dtype.element_ty)
        for start in range(0, body, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            tl.store(body_out + columns, zeros, mask=columns < body)
        if HAS_EDGES:
            columns, inside = edges(out, lead, body, V)
            tl.store(out + columns, 0.0, mask=inside)
        return

    grad = tl.where((label >= 0) & (label < V), tl.load(grad_logps + row), float("nan"))
    m = tl.load(norms + row)
    share = grad * tl.exp(-tl.load(norms + n_rows + row))  # grad / S
    body_x = logits + lead
    if ALIGNED_ALIKE:
        body_x = on_boundary(body_x)
    for start in range(0, body, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < body
        x = tl.load(body_x + columns, mask=inside, other=0.0)  # (BLOCK_V,)
        dx = _gradient(x, columns == label - lead, m, grad, share, inner, outer, HAS_SOFTCAP)
        tl.store(body_out + columns, dx.to(out.dtype.element_ty), mask=inside)
    if HAS_EDGES:
        columns, inside = edges(out, lead, body, V)
        # Every warp loads these few columns, and one stores them, which may be over the logits. What a late warp reads
        # goes nowhere: no value passes from a thread to another here. With a reduction it would take a barrier.
        x = tl.load(logits + columns, mask=inside, other=0.0)
        dx = _gradient(x, columns == label, m, grad, share, inner, outer, HAS_SOFTCAP)
        tl.store(out + columns, dx.to(out.dtype.element_ty), mask=inside)


def factors(temperature: float, softcap: float | None, logit_scale: float) -> tuple[float, float]:
    """(inner, outer) such that z = outer * tanh(inner * x); without softcap z = outer * x and inner is unused."""
    if softcap is None:
        return 1.0, logit_scale / temperature
    return logit_scale / softcap, softcap / temperature


def _aligned_alike(x: Tensor, y: Tensor) -> bool:
    """Whether each row of x (N, V) is as far from a 16-byte boundary as that of y."""
    return (x.data_ptr() - y.data_ptr()) % 16 == 0 and (x.stride(0) - y.stride(0)) * x.element_size() % 16 == 0


def block(v: int, largest: int) -> int:
    """Columns of a block. Each power of two is a kernel of its own; below 1024 a thread has not one vector of bf16."""
    return min(largest, max(1024, triton.next_power_of_2(v)))


def token_logprobs_fwd(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    n, v = logits.shape
    assert logits.dtype in (torch.bfloat16, torch.float16, torch.float32), logits.dtype
    assert v > 0 and (v == 1 or logits.stride(1) == 1) and labels.shape == (n,)
    logps = torch.empty(n, dtype=torch.float32, device=logits.device)
    norms = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(4, n, dtype=torch.float32, device=logits.device) if stats else None
    if n > 0:
        inner, outer = factors(temperature, softcap, logit_scale)
        with torch.cuda.device_of(logits):  # Triton launches on the current device; a no-op for CPU tensors
            _token_logprobs_fwd_kernel[(n,)](
                logits,
                labels.contiguous(),
                logps,
                norms,
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
                BLOCK_V=block(v, FORWARD_BLOCK),
                num_warps=NUM_WARPS,
            )
    return logps, norms, statistics


def token_logprobs_bwd(
    logits: Tensor,
    labels: Tensor,
    norms: Tensor,
    grad_logps: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    out: Tensor,
) -> Tensor:
    n, v = logits.shape
    assert v > 0 and (v == 1 or (logits.stride(1) == 1 and out.stride(1) == 1))
    assert out.shape == logits.shape and out.dtype == logits.dtype
    assert labels.shape == grad_logps.shape == (n,) and norms.shape == (2, n)
    if n > 0:
        inner, outer = factors(temperature, softcap, logit_scale)
        with torch.cuda.device_of(logits):
            _token_logprobs_bwd_kernel[(n,)](
                logits,
                labels.contiguous(),
                norms.contiguous(),
                grad_logps.float().contiguous(),
                out,
                logits.stride(0),
                out.stride(0),
                n,
                v,
                ignore_index,
                inner,
                outer,
                HAS_SOFTCAP=softcap is not None,
                HAS_EDGES=has_edges(out),
                ALIGNED_ALIKE=_aligned_alike(logits, out),
                BLOCK_V=block(v, BACKWARD_BLOCK),
                num_warps=NUM_WARPS,
            )
    return out


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
