"""Log-probabilities of given tokens from logits, in Triton: one read forward, one read and one write backward.

For a row x of V logits and its label y, with z and t = z log2(e) - n as in `row`:

    m   = max_j z_j,   S = sum_j exp(z_j - m)
    logp = (z_y - m) - log S = t_y log 2 - log sum_j 2^t_j
    d logp / d x_j = ([j = y] - exp(z_j - m) / S) dz_j/dx_j

A row is one program. Forward, each of its threads has a maximum and sums of its own, of the columns that it holds: it
takes the maximum of what it loaded, the anchor n follows, and then each element costs one exponential. The threads meet
once, at the end of the row; there is no barrier in the loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels.row import (
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
    max_of_thread,
    natural_z,
    num_warps,
    on_boundary,
    product_of_thread,
    relative_slope,
    split,
    sum_of_thread,
    transform_of,
)

# Not measured: no GPU has run this number yet. Sixteen elements a thread need 32 registers (sm_90), and a program that
# has no reductions fills the multiprocessor with that.
BACKWARD_BLOCK = 2048


@triton.jit
def shrink_sums(n, new_n, total, total_et, total_ee):
    """Factor 2^(n - new_n), and the sums of 2^t t and of 4^t of the anchor n as they are with the new one."""
    d = n - new_n
    factor = tl.exp2(d)
    return factor, factor * (total_et + total * tl.maximum(d, FLOOR)), factor * factor * total_ee


@triton.jit
def _fold(
    block, size, m, n, total, total_z, total_et, total_ee, inner, outer2,
    KIND: tl.constexpr, FLIP: tl.constexpr, HAS_STATS: tl.constexpr, MASKED: tl.constexpr,
    THREADS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """The state of each thread with one more block, of `size` columns where MASKED: the maximum m of x and its anchor
    n, and the sums of e = 2^t, of z (of x where LINEAR), e t and e^2. All are (THREADS,).
    """
    x = load_block(block, size, THREADS, LOADS, MASKED, FLIP)
    m = tl.maximum(m, max_of_thread(x))
    new_n = log2_z(bounded(m, inner, KIND), outer2, 0.0, KIND)
    new_n = tl.where(new_n == -float("inf"), 0.0, new_n)  # all masked so far: -inf - -inf would be NaN
    t = log2_z(bounded(x, inner, KIND), outer2, new_n[None, :, None], KIND)
    if MASKED:
        inside = tl.reshape(block_columns(LOADS * THREADS, x.shape[2]) < size, x.shape)
        t = tl.where(inside, t, -float("inf"))  # under a softcap x = -inf has a finite z
    e = tl.exp2(t)
    if HAS_STATS:
        factor, total_et, total_ee = shrink_sums(n, new_n, total, total_et, total_ee)
        if KIND != LINEAR:
            x = t + new_n[None, :, None]
        if MASKED:
            x = tl.where(inside, x, 0.0)
        total_z += sum_of_thread(x)
        total_et += product_of_thread(e, tl.maximum(t, FLOOR))
        total_ee += product_of_thread(e, e)
    else:
        factor = tl.exp2(n - new_n)
    total = tl.fma(total, factor, sum_of_thread(e))
    return m, new_n, total, total_z, total_et, total_ee


# The body's alignment is worked out here, not left to Triton's specialisation on arguments that happen to be divisible
# by 16, which would compile a kernel for each combination of V, strides and slices of labels.
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
    outer2,
    KIND: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
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
    label_x = load_one(logits, label, (label >= 0) & (label < V), FLIP)

    m = tl.full((THREADS,), -float("inf"), tl.float32)
    n = tl.full((THREADS,), -float("inf"), tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    total_z = tl.zeros((THREADS,), tl.float32)
    total_et = tl.zeros((THREADS,), tl.float32)
    total_ee = tl.zeros((THREADS,), tl.float32)
    lead, body = split(logits, V, HAS_EDGES)
    body_x = on_boundary(logits + lead)
    BLOCK: tl.constexpr = LOADS * THREADS * (128 // logits.dtype.element_ty.primitive_bitwidth)
    whole = body // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        m, n, total, total_z, total_et, total_ee = _fold(
            body_x + start, BLOCK, m, n, total, total_z, total_et, total_ee, inner, outer2,
            KIND, FLIP, HAS_STATS, False, THREADS, LOADS,
        )  # fmt: skip
    if whole < body:
        m, n, total, total_z, total_et, total_ee = _fold(
            body_x + whole, body - whole, m, n, total, total_z, total_et, total_ee, inner, outer2,
            KIND, FLIP, HAS_STATS, True, THREADS, LOADS,
        )  # fmt: skip

    row_m = tl.max(m, axis=0)
    if HAS_EDGES:  # after the body, which has brought their lines into the caches
        columns, inside = edges(logits, lead, body, V)
        edge_x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
        edge_x = tl.where(inside, 0.0 - edge_x if FLIP else edge_x, -float("inf"))
        row_m = tl.maximum(row_m, tl.max(edge_x, axis=0))
    row_b = bounded(row_m, inner, KIND)
    anchor = log2_z(row_b, outer2, 0.0, KIND)
    anchor = tl.where(anchor == -float("inf"), 0.0, anchor)
    factor, total_et, total_ee = shrink_sums(n, anchor, total, total_et, total_ee)
    sum_e = tl.sum(total * factor, axis=0)
    sum_z = tl.sum(total_z, axis=0)
    sum_et = tl.sum(total_et, axis=0)
    sum_ee = tl.sum(total_ee, axis=0)
    if HAS_EDGES:
        t = log2_z(bounded(edge_x, inner, KIND), outer2, anchor, KIND)
        t = tl.where(inside, t, -float("inf"))
        e = tl.exp2(t)
        sum_e += tl.sum(e, axis=0)
        if HAS_STATS:
            sum_z += tl.sum(tl.where(inside, edge_x if KIND == LINEAR else t + anchor, 0.0), axis=0)
            sum_et += tl.sum(e * tl.maximum(t, FLOOR), axis=0)
            sum_ee += tl.sum(e * e, axis=0)

    # The anchor is the maximum but for its rounding, which `row_t` takes back. m and log S apart: their sum would be
    # rounded at the size of m, and logp and gradient with it.
    row_z = natural_z(row_b, outer, KIND)
    empty = row_z == -float("inf")
    row_t = tl.where(empty, 0.0, log2_z(row_b, outer2, anchor, KIND))
    log_sum = tl.log(sum_e * tl.exp2(-row_t))
    label_b = bounded(label_x, inner, KIND)
    label_z = natural_z(label_b, outer, KIND)
    tl.store(logps + row, log_prob(log2_z(label_b, outer2, anchor, KIND) - row_t, label_z, log_sum))
    tl.store(norms + row, tl.where(empty, 0.0, row_z))
    tl.store(norms + n_rows + row, log_sum)
    if HAS_STATS:
        tl.store(stats + row, log_sum - (sum_et / sum_e - row_t) * LN_2)
        tl.store(stats + n_rows + row, sum_z / V * (outer if KIND == LINEAR else LN_2))
        tl.store(stats + 2 * n_rows + row, (label_z >= row_z).to(tl.float32))
        tl.store(stats + 3 * n_rows + row, tl.log(sum_ee * tl.exp2(-2.0 * row_t)) - 2.0 * log_sum)


@triton.jit
def _gradient(x, is_label, m, grad, share, inner, outer, slope, KIND: tl.constexpr):
    """(grad * onehot - share * exp(z - m)) * dz/dx of a block x."""
    b = bounded(x.to(tl.float32), inner, KIND)
    e = tl.exp2((natural_z(b, outer, KIND) - m) * LOG2_E)
    return (tl.where(is_label, grad, 0.0) - share * e) * (slope * relative_slope(b, KIND))


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
    slope,
    KIND: tl.constexpr,
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
        dx = _gradient(x, columns == label - lead, m, grad, share, inner, outer, slope, KIND)
        tl.store(body_out + columns, dx.to(out.dtype.element_ty), mask=inside)
    if HAS_EDGES:
        columns, inside = edges(out, lead, body, V)
        # Every warp loads these few columns, and one stores them, which may be over the logits. What a late warp reads
        # goes nowhere: no value passes from a thread to another here. With a reduction it would take a barrier.
        x = tl.load(logits + columns, mask=inside, other=0.0)
        dx = _gradient(x, columns == label, m, grad, share, inner, outer, slope, KIND)
        tl.store(out + columns, dx.to(out.dtype.element_ty), mask=inside)


def _aligned_alike(x: Tensor, y: Tensor) -> bool:
    """Whether each row of x (N, V) is as far from a 16-byte boundary as that of y."""
    return (x.data_ptr() - y.data_ptr()) % 16 == 0 and (x.stride(0) - y.stride(0)) * x.element_size() % 16 == 0


def backward_block(v: int) -> int:
    """Columns of a block. Each power of two is a kernel of its own; below 1024 a thread has not one vector of bf16."""
    return min(BACKWARD_BLOCK, max(1024, triton.next_power_of_2(v)))


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
    """log_softmax(z, -1)[range(N), labels] and what normalizes z, with z of the logits as at the top of this file.

    logits (N, V) bf16, fp16 or fp32, any row stride; labels (N,) int64. Returns logps (N,), norms (2, N) and None or
    stats (4, N), all float32. The rows of norms: max z and log sum exp(z - max z), which make logsumexp(z) together
    (for a row of -inf alone 0 and -inf). The rows of stats: entropy of softmax(z), mean of z over V, 1.0 where
    z[label] >= max z and else 0.0, log sum softmax(z)^2. Ignored rows are not read and give 0 everywhere; a label
    outside [0, V) gives logp NaN; -inf is a legal logit.
    """
    n, v = logits.shape
    assert logits.dtype in (torch.bfloat16, torch.float16, torch.float32), logits.dtype
    assert v > 0 and (v == 1 or logits.stride(1) == 1) and labels.shape == (n,)
    logps = torch.empty(n, dtype=torch.float32, device=logits.device)
    norms = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(4, n, dtype=torch.float32, device=logits.device) if stats else None
    if n > 0:
        transform = transform_of(logits.dtype, temperature, softcap, logit_scale)
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
                transform.inner,
                transform.outer,
                transform.outer * LOG2_E.value,
                KIND=transform.KIND,
                FLIP=transform.FLIP,
                HAS_STATS=stats,
                HAS_EDGES=has_edges(logits),
                THREADS=THREADS,
                LOADS=loads(logits.dtype, heavy=stats and POLYNOMIAL.value == transform.KIND),
                num_warps=num_warps(),
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
    """out = grad_logps[:, None] * (onehot(labels) - softmax(z)) * dz/dx, the gradient of the logits.

    logits (N, V) and norms (2, N) as in the forward; labels, grad_logps (N,); out (N, V) in the dtype of logits, any
    row stride, may be logits itself. Returns out. Ignored rows get exact zeros and are not read, a label outside [0, V)
    gives NaN.
    """
    n, v = logits.shape
    assert v > 0 and (v == 1 or (logits.stride(1) == 1 and out.stride(1) == 1))
    assert out.shape == logits.shape and out.dtype == logits.dtype
    assert labels.shape == grad_logps.shape == (n,) and norms.shape == (2, n)
    if n > 0:
        transform = transform_of(logits.dtype, temperature, softcap, logit_scale)
        inner, outer = transform.signed()
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
                transform.slope,
                KIND=transform.KIND,
                HAS_EDGES=has_edges(out),
                ALIGNED_ALIKE=_aligned_alike(logits, out),
                BLOCK_V=backward_block(v),
                num_warps=num_warps(),
            )
    return out
