"""The functions of the Triton kernels in plain PyTorch, on any device: log-probabilities of given tokens from logits,
and at the end the gather of keys and values.

For a row x of V logits and its label y, with s = logit_scale, T = temperature, c = softcap:

    z_j = c tanh(s x_j / c) / T                 (without softcap: z_j = s x_j / T)
    m   = max_j z_j,   S = sum_j exp(z_j - m)
    logp = (z_y - m) - log S
    d logp / d x_j = ([j = y] - exp(z_j - m) / S) dz_j/dx_j

Rows of logits are processed in chunks through one buffer that is written over and over: on a CPU the passes over a
chunk then run in the cache, and beside its results a call allocates no more than a few chunks. Nothing here waits for a
CUDA device.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of a chunk in the dtype of the arithmetic. On a CPU it should fit the caches but keep the passes long enough to
# share between cores (the best of 0.25 to 16 MiB on two); on a device it need only be small beside the logits and large
# enough to hide the launches.
CPU_CHUNK = 1 << 22
DEVICE_CHUNK = 1 << 28

# Where a factor exp(d) has underflowed to 0, d itself may be -inf; no lower than this, 0 * d is 0 and not NaN.
FLOOR = -1000.0


def _arithmetic_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunk_rows(logits: Tensor) -> int:
    n, v = logits.shape
    chunk = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    return min(n, max(1, chunk // (v * _arithmetic_dtype(logits).itemsize)))


def _new_buffer(logits: Tensor) -> Tensor:
    """An uninitialized chunk (rows, V)."""
    return torch.empty(_chunk_rows(logits), logits.shape[1], dtype=_arithmetic_dtype(logits), device=logits.device)


def _chunks(kept: Tensor, step: int) -> Iterator[tuple[slice, bool]]:
    """Slices of `step` rows, and whether all rows of the slice are kept.

    On a CPU, slices without a kept row are left out. Elsewhere to ask would be a sync, so every slice counts as mixed.
    """
    n = len(kept)
    for start in range(0, n, max(1, step)):
        rows = slice(start, min(start + step, n))
        if kept.device.type != "cpu":
            yield rows, False
        elif kept[rows].any():
            yield rows, bool(kept[rows].all())


def _factors(temperature: float, softcap: float | None, logit_scale: float) -> tuple[float, float]:
    """(inner, outer) such that z = outer * tanh(inner * x); without softcap z = outer * x and inner is unused."""
    if softcap is None:
        return 1.0, logit_scale / temperature
    return logit_scale / softcap, softcap / temperature


def _exp_(x: Tensor) -> Tensor:
    """exp(x) in place. On a CPU, PyTorch's exp2 takes a third of the time of its exp (MKL's) and is as accurate."""
    return x.mul_(math.log2(math.e)).exp2_()


def _scaled(x: Tensor, factor: float, out: Tensor) -> Tensor:
    """factor * x in the dtype of out, written to out; x itself where that is the same."""
    if x.dtype != out.dtype:
        return out.copy_(x).mul_(factor)  # torch.mul(x, factor, out=out) would round to the dtype of x
    return x if factor == 1.0 else torch.mul(x, factor, out=out)


class _Softmax(NamedTuple):
    """What a chunk of C rows of raw logits tells, and what its gradient can be made of."""

    logp: Tensor  # (C,)
    norms: Tensor  # (2, C)
    stats: Tensor | None  # (4, C)
    e: Tensor  # (C, V) exp(z - anchor), in the chunk's work space
    total: Tensor  # (C, 1) its sums
    slope: Tensor | None  # (C, V) dz/dx under a softcap, where asked for


def _softmax(
    x: Tensor, targets: Tensor, in_range: Tensor, work: Tensor, inner: float, outer: float, softcap: bool,
    stats: bool, slope: bool = False,
) -> _Softmax:  # fmt: skip
    """x (C, V) raw logits, targets and in_range (C, 1); `work` (C, V) is written over and may be x."""
    if softcap:
        z = torch.tanh(_scaled(x, inner, work), out=work).mul_(outer)
    else:
        z = _scaled(x, outer, work)
    dz = z.square().mul_(-inner / outer).add_(outer * inner) if softcap and slope else None
    m = z.amax(1, keepdim=True)  # (C, 1)
    label_z = z.gather(1, targets).masked_fill_(~in_range, torch.nan)
    mean_z = z.mean(1) if stats else None
    anchor = m.masked_fill(m == -torch.inf, 0.0)  # all masked: -inf - -inf would be NaN
    d = torch.sub(z, anchor, out=work)
    d_kept = d.clone() if stats else None
    e = _exp_(d)
    total = e.sum(1, keepdim=True)  # (C, 1)
    log_total = total.log()
    values = None
    if d_kept is not None and mean_z is not None:
        total_ed = d_kept.clamp_(min=FLOOR).mul_(e).sum(1)
        total_ee = torch.mul(e, e, out=d_kept).sum(1)
        flat = log_total.squeeze(1)
        top1 = (label_z >= m).squeeze(1).to(work.dtype)
        values = torch.stack([flat - total_ed / total.squeeze(1), mean_z, top1, total_ee.log() - 2.0 * flat])
    # m and log S apart: their sum would be rounded at the size of m, and logp and gradient with it.
    logp = (label_z - anchor - log_total).squeeze(1)
    return _Softmax(logp, torch.cat([anchor, log_total], dim=1).t(), values, e, total, dz)


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

    logits (N, V) bf16, fp16, fp32 or fp64, any strides; labels (N,) int64. Returns logps (N,), norms (2, N) and None or
    stats (4, N), float32 (float64 for float64 logits). The rows of norms: max z and log sum exp(z - max z), which make
    logsumexp(z) together (for a row of -inf alone 0 and -inf). The rows of stats: entropy of softmax(z), mean of z over
    V, 1.0 where z[label] >= max z and else 0.0, log sum softmax(z)^2. Ignored rows give 0 everywhere whatever they
    hold; a label outside [0, V) gives logp NaN; -inf is a legal logit.
    """
    n, v = logits.shape
    assert v > 0 and labels.shape == (n,)
    inner, outer = _factors(temperature, softcap, logit_scale)
    kept = labels != ignore_index
    in_range = ((labels >= 0) & (labels < v)).unsqueeze(1)  # (N, 1)
    targets = labels.clamp(0, v - 1).unsqueeze(1)  # (N, 1)

    buffer = _new_buffer(logits)
    logps = torch.zeros(n, dtype=buffer.dtype, device=logits.device)
    norms = logps.new_zeros(2, n)
    statistics = logps.new_zeros(4, n) if stats else None
    for rows, _ in _chunks(kept, len(buffer)):
        work = buffer[: rows.stop - rows.start]  # (C, V)
        chunk = _softmax(logits[rows], targets[rows], in_range[rows], work, inner, outer, softcap is not None, stats)
        logps[rows] = chunk.logp.where(kept[rows], 0.0)
        norms[:, rows] = chunk.norms.where(kept[rows], 0.0)
        if statistics is not None and chunk.stats is not None:
            statistics[:, rows] = chunk.stats.where(kept[rows], 0.0)
    return logps, norms, statistics


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

    One exponential an element. The scale is None, for ones: here q has its factor. But for float16, whose range is too
    small for the rows of tokens that are almost certain: these are lifted by a power of two (`lifted`).

    logits (N, V) as in `token_logprobs_fwd`, overwritten: zeros where ignored, NaN where the label is outside [0, V).
    """
    n, v = logits.shape
    assert v > 0 and labels.shape == (n,)
    inner, outer = _factors(temperature, softcap, logit_scale)
    kept = labels != ignore_index
    in_range = ((labels >= 0) & (labels < v)).unsqueeze(1)  # (N, 1)
    targets = labels.clamp(0, v - 1).unsqueeze(1)  # (N, 1)
    dtype = _arithmetic_dtype(logits)
    step = _chunk_rows(logits)
    buffer = None if logits.dtype == dtype else _new_buffer(logits)
    logps = torch.zeros(n, dtype=dtype, device=logits.device)
    statistics = logps.new_zeros(4, n) if stats else None
    scale = torch.ones_like(logps) if logits.dtype == torch.float16 else None

    done = 0  # rows before this one are written
    for rows, all_kept in _chunks(kept, step):
        logits[done : rows.start] = 0.0
        done = rows.stop
        target = logits[rows]  # (C, V)
        work = target if buffer is None else buffer[: len(target)]
        chunk = _softmax(
            target, targets[rows], in_range[rows], work, inner, outer, softcap is not None, stats, slope=True
        )
        logps[rows] = chunk.logp.where(kept[rows], 0.0)
        if statistics is not None and chunk.stats is not None:
            statistics[:, rows] = chunk.stats.where(kept[rows], 0.0)
        slope = torch.full_like(chunk.total, outer if softcap is None else 1.0)  # (C, 1)
        if scale is not None:
            lift = lifted(logps[rows])
            scale[rows] = 1.0 / lift
            slope *= lift.unsqueeze(1)
        dx = chunk.e.mul_((-slope / chunk.total).masked_fill_(~in_range[rows], torch.nan))
        dx[torch.arange(len(dx), device=dx.device), targets[rows].squeeze(1)] += slope.squeeze(1)
        if chunk.slope is not None:
            dx.mul_(chunk.slope)
        if not all_kept:
            dx.masked_fill_(~kept[rows].unsqueeze(1), 0.0)
        if dx is not target:
            target.copy_(dx)
    logits[done:] = 0.0
    return logps, scale, statistics


def lifted(logps: Tensor) -> Tensor:
    """Powers of two that bring the largest entry of onehot - softmax(z), which is 1 - exp(logp), near to 1."""
    # Beyond 2**24 the log-prob is 0 in float32. NaN, of a label outside, is left as it is.
    return torch.expm1(logps).neg().clamp(2.0**-24, 1.0).log2().floor().neg().exp2().nan_to_num(1.0)


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
    strides, may be logits itself. Returns out. Ignored rows get exact zeros whatever they hold, a label outside [0, V)
    gives NaN.
    """
    n, v = logits.shape
    assert v > 0 and out.shape == logits.shape and out.dtype == logits.dtype
    assert labels.shape == grad_logps.shape == (n,) and norms.shape == (2, n)
    inner, outer = _factors(temperature, softcap, logit_scale)
    kept = labels != ignore_index
    targets = labels.clamp(0, v - 1)  # (N,)
    dtype = _arithmetic_dtype(logits)
    # The arithmetic runs in `out` itself where that has its dtype; a softcap needs room for its slope besides.
    buffer = None if out.dtype == dtype and softcap is None else _new_buffer(logits)
    grads = grad_logps.to(dtype).masked_fill((labels < 0) | (labels >= v), torch.nan)
    if softcap is None:
        grads = grads * outer  # dz/dx is the same for all
    grads, m = grads.unsqueeze(1), norms[0].unsqueeze(1)  # (N, 1)
    shares = grads * norms[1].neg().exp().unsqueeze(1)  # (N, 1) grad / S

    done = 0  # rows before this one are written
    for rows, all_kept in _chunks(kept, _chunk_rows(logits)):
        out[done : rows.start] = 0.0
        done = rows.stop
        target = out[rows]  # (C, V)
        work = target if buffer is None else buffer[: len(target)]
        slope = None
        if softcap is None:
            z, dx = _scaled(logits[rows], outer, work), work
        else:
            t = torch.tanh(_scaled(logits[rows], inner, work), out=work)
            z = dx = t * outer
            slope = t.square_().mul_(-outer * inner).add_(outer * inner)
        _exp_(torch.sub(z, m[rows], out=dx)).mul_(-shares[rows])
        dx[torch.arange(len(dx), device=dx.device), targets[rows]] += grads[rows].squeeze(1)
        if slope is not None:
            dx.mul_(slope)
        if not all_kept:
            dx.masked_fill_(~kept[rows].unsqueeze(1), 0.0)
        if dx is not target:
            target.copy_(dx)
    out[done:] = 0.0
    return out


def gather_kv_fwd(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(key.index_select(0, index), value.index_select(0, index)), the gathered keys and values.

    key (T, H, d), value (T, H, dv) bf16, fp16, fp32 or fp64, any strides; index (K,) int64 in [0, T). Returns
    (K, H, d) and (K, H, dv), contiguous.
    """
    return key.index_select(0, index), value.index_select(0, index)


def gather_kv_bwd(grad_key: Tensor, grad_value: Tensor, copies: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """For both gradients x: out[t] = x.float()[copies[offsets[t] : offsets[t + 1]]].sum(0), rounded to the dtype of x.

    grad_key (K, H, d), grad_value (K, H, dv) bf16, fp16, fp32 or fp64 (for which the sum is float64), any strides;
    copies (K,) int64 in [0, K) and offsets (T + 1,) int64, ascending from 0 to K. Returns (T, H, d) and (T, H, dv),
    contiguous. Added in the order of `copies`: the same numbers every time. A row without copies gets zeros.
    """
    return _sum_of_copies(grad_key, copies, offsets), _sum_of_copies(grad_value, copies, offsets)


def _sum_of_copies(grad: Tensor, copies: Tensor, offsets: Tensor) -> Tensor:
    """(K, H, d) -> (T, H, d)."""
    # A bag of embeddings is summed by one thread in the order of its indices, on a GPU too, where index_add_ is atomic.
    # On a CPU it is the fastest way there is, but rounds ties of bf16 upwards: hence the cast here, and back.
    rows = grad.to(_arithmetic_dtype(grad)).flatten(1)  # (K, H d)
    sums = torch.nn.functional.embedding_bag(copies, rows, offsets, mode="sum", include_last_offset=True)
    return sums.to(grad.dtype).view(len(sums), *grad.shape[1:])
