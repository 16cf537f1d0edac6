"""Log-probabilities of given tokens from logits, in Triton: one read forward, one read and one write backward.

For a row x of V logits and its label y, with s = logit_scale, T = temperature, c = softcap:

    z_j = c tanh(s x_j / c) / T                 (without softcap: z_j = s x_j / T)
    m   = max_j z_j,   S = sum_j exp(z_j - m)   (kept over blocks of V: when m grows, S shrinks by exp(m_old - m_new))
    lse = m + log S,   logp = (z_y - m) - log S
    d logp / d x_j = ([j = y] - exp(z_j - lse)) dz_j/dx_j

A row is one program that walks over V in blocks. It takes the maximum of a block first and then exponentiates each
element once: a running maximum per lane would need two exponentials an element, and the special-function unit, not the
memory, would then set the pace. `fastdpo_kernels.eager` has the same two functions in plain PyTorch.
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
def _transform(x, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """z of raw logits: outer * tanh(inner * x), or outer * x."""
    if HAS_SOFTCAP:
        x = _tanh(inner * x)
    return outer * x


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _token_logprobs_fwd_kernel(
    logits,  # (N, V)
    labels,  # (N,)
    logps,  # (N,)
    lses,  # (N,)
    stats,  # (4, N) or None
    row_stride,
    n_rows,
    V,
    ignore_index,
    inner,
    outer,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(logps + row, 0.0)
        tl.store(lses + row, 0.0)
        if HAS_STATS:
            for k in tl.static_range(4):
                tl.store(stats + k * n_rows + row, 0.0)
        return

    logits += row * row_stride
    # An out-of-range label reads nothing, and its NaN becomes the log-prob.
    label_x = tl.load(logits + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    label_z = _transform(label_x, inner, outer, HAS_SOFTCAP)

    m = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)  # sum e, where e = exp(z - m)
    if HAS_STATS:
        total_z = tl.zeros((), tl.float32)  # sum z
        total_ed = tl.zeros((), tl.float32)  # sum e (z - m)
        total_ee = tl.zeros((), tl.float32)  # sum e^2
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < V
        x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_V,)
        z = tl.where(inside, _transform(x, inner, outer, HAS_SOFTCAP), -float("inf"))
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
        m = new_m

    anchor = tl.where(m == -float("inf"), 0.0, m)
    log_total = tl.log(total)
    tl.store(logps + row, (label_z - anchor) - log_total)  # not label_z - lse, which rounds twice at the size of m
    tl.store(lses + row, anchor + log_total)
    if HAS_STATS:
        tl.store(stats + row, log_total - total_ed / total)
        tl.store(stats + n_rows + row, total_z / V)
        tl.store(stats + 2 * n_rows + row, (label_z >= m).to(tl.float32))
        tl.store(stats + 3 * n_rows + row, tl.log(total_ee) - 2.0 * log_total)


@triton.jit(do_not_specialize=["ignore_index"])
def _token_logprobs_bwd_kernel(
    logits,  # (N, V)
    labels,  # (N,)
    lses,  # (N,)
    grad_logps,  # (N,)
    out,  # (N, V), may be logits
    row_stride,
    out_row_stride,
    V,
    ignore_index,
    inner,
    outer,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    out += row * out_row_stride
    label = tl.load(labels + row)
    if label == ignore_index:
        zeros = tl.zeros((BLOCK_V,), out.dtype.element_ty)
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            tl.store(out + columns, zeros, mask=columns < V)
        return

    lse = tl.load(lses + row)
    grad = tl.load(grad_logps + row)
    grad = tl.where((label >= 0) & (label < V), grad, float("nan"))
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < V
        x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_V,)
        if HAS_SOFTCAP:
            t = _tanh(inner * x)
            z = outer * t
            slope = outer * inner * (1.0 - t * t)
        else:
            z = outer * x
            slope = outer
        onehot = tl.where(columns == label, 1.0, 0.0)
        dx = grad * (onehot - tl.exp(z - lse)) * slope
        tl.store(out + columns, dx.to(out.dtype.element_ty), mask=inside)


def _factors(temperature: float, softcap: float | None, logit_scale: float) -> tuple[float, float]:
    """(inner, outer) such that z = outer * tanh(inner * x); without softcap z = outer * x and inner is unused."""
    if softcap is None:
        return 1.0, logit_scale / temperature
    return logit_scale / softcap, softcap / temperature


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
    """log_softmax(z, -1)[range(N), labels] and logsumexp(z, -1), with z of the logits as at the top of this file.

    logits (N, V) bf16, fp16 or fp32, any row stride; labels (N,) int64. Returns logps (N,), lse (N,) and None or stats
    (4, N), all float32. The rows of stats: entropy of softmax(z), mean of z over V, 1.0 where z[label] >= max z and
    else 0.0, log sum softmax(z)^2. Ignored rows are not read and give 0 everywhere; a label outside [0, V) gives
    logp NaN; -inf is a legal logit.
    """
    n, v = logits.shape
    assert logits.dtype in (torch.bfloat16, torch.float16, torch.float32), logits.dtype
    assert v > 0 and (v == 1 or logits.stride(1) == 1) and labels.shape == (n,)
    logps = torch.empty(n, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logps)
    statistics = torch.empty(4, n, dtype=torch.float32, device=logits.device) if stats else None
    if n > 0:
        inner, outer = _factors(temperature, softcap, logit_scale)
        with torch.cuda.device_of(logits):  # Triton launches on the current device; a no-op for CPU tensors
            _token_logprobs_fwd_kernel[(n,)](
                logits,
                labels.contiguous(),
                logps,
                lse,
                statistics,
                logits.stride(0),
                n,
                v,
                ignore_index,
                inner,
                outer,
                HAS_SOFTCAP=softcap is not None,
                HAS_STATS=stats,
                BLOCK_V=min(FORWARD_BLOCK, triton.next_power_of_2(v)),
                num_warps=NUM_WARPS,
            )
    return logps, lse, statistics


def token_logprobs_bwd(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    out: Tensor,
) -> Tensor:
    """out = grad_logps[:, None] * (onehot(labels) - exp(z - lse[:, None])) * dz/dx, the gradient of the logits.

    logits (N, V) as in the forward; labels, lse, grad_logps (N,); out (N, V) in the dtype of logits, any row stride,
    may be logits itself. Returns out. Ignored rows get exact zeros and are not read, a label outside [0, V) gives NaN.
    """
    n, v = logits.shape
    assert v > 0 and (v == 1 or (logits.stride(1) == 1 and out.stride(1) == 1))
    assert out.shape == logits.shape and out.dtype == logits.dtype
    assert labels.shape == lse.shape == grad_logps.shape == (n,)
    if n > 0:
        inner, outer = _factors(temperature, softcap, logit_scale)
        with torch.cuda.device_of(logits):
            _token_logprobs_bwd_kernel[(n,)](
                logits,
                labels.contiguous(),
                lse.contiguous(),
                grad_logps.float().contiguous(),
                out,
                logits.stride(0),
                out.stride(0),
                v,
                ignore_index,
                inner,
                outer,
                HAS_SOFTCAP=softcap is not None,
                BLOCK_V=min(BACKWARD_BLOCK, triton.next_power_of_2(v)),
                num_warps=NUM_WARPS,
            )
    return out
