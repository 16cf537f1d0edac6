"""Log-probabilities of given tokens from logits, in Triton: one read forward, one read and one write backward.

For a row x of V logits and its label y, with s = logit_scale, T = temperature, c = softcap:

    z_j = c tanh(s x_j / c) / T                 (without softcap: z_j = s x_j / T)
    m   = max_j z_j,   S = sum_j exp(z_j - m)   (kept over blocks of V: when m grows, S shrinks by exp(m_old - m_new))
    logp = (z_y - m) - log S
    d logp / d x_j = ([j = y] - exp(z_j - m) / S) dz_j/dx_j

A row is one program that walks over V in blocks. It takes the maximum of a block first and then exponentiates each
element once: a running maximum per lane would need two exponentials an element, and the special-function unit, not the
memory, would then set the pace. `fastdpo_kernels.eager` has the same functions in plain PyTorch,
`token_logprobs_grad` both passes in one for logits that may be overwritten.

Memory moves 128 bits at a time for every V and row stride. A row is split at the 16-byte boundaries within it,

    | lead | body, whole 16-byte vectors | tail |         lead, tail: less than a vector each, together the edges

the blocks cover the body, and the edges are one small block of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not measured: no GPU has run these numbers yet; they come from counting. A forward block is 32 elements a thread, four
# 128-bit loads of bf16 in flight, at 47 registers (sm_90): ten programs fit on a multiprocessor, and while some wait in
# the two reductions of a block, the others keep the memory busy. The backward has no reductions; with half the block it
# needs 32 registers and fills the multiprocessor. Four warps keep the barriers of a reduction cheap.
FORWARD_BLOCK = 4096
BACKWARD_BLOCK = 2048
NUM_WARPS = 4

# Where a factor exp(d) has underflowed to 0, d itself may be -inf; no lower than this, 0 * d is 0 and not NaN.
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
def split(row, V, HAS_EDGES: tl.constexpr):
    """(lead, body) of the row at this address, in elements."""
    SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    VECTOR: tl.constexpr = 16 // SIZE
    lead = 0
    if HAS_EDGES:
        lead = (-row.to(tl.int64) & 15).to(tl.int32) // SIZE
    # A product with the vector, so that the compiler sees that the mask `columns < body` splits no vector. Division
    # truncates: where the lead alone is longer than V, the body is 0.
    return lead, (V - lead) // VECTOR * VECTOR


@triton.jit
def on_boundary(pointer):
    """The pointer, which must be a multiple of 16 bytes, in a form in which the compiler knows that it is."""
    # The rounding changes nothing. But a hint on a mere sum is lost where Triton folds the sum away.
    return tl.multiple_of((pointer.to(tl.int64) // 16 * 16).to(pointer.dtype), 16)


@triton.jit
def edges(row, lead, body, V):
    """Columns of the lead and, after them, of the tail, and which of them there are. At most a vector less one each."""
    i = tl.arange(0, 256 // row.dtype.element_ty.primitive_bitwidth)
    columns = i + tl.where(i < lead, 0, body)
    return columns, columns < V


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


def has_edges(x: Tensor) -> bool:
    """Whether a row of x (N, V) may begin or end within a 16-byte vector."""
    row_stride, v = x.stride(0) * x.element_size(), x.shape[1] * x.element_size()
    return x.data_ptr() % 16 != 0 or row_stride % 16 != 0 or v % 16 != 0


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
