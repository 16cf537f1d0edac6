"""Log-probs from hidden states, a tile of logits at a time.

    x = hidden @ weight.T + bias                      (N, V), as much of it at a time as the caller's tile holds
    logp_i = log softmax(z(x_i))[label_i]             z: scale, softcap, temperature, as in token_logprobs

The matrix products stay with the BLAS of the device; only the softmax work on a tile is ours (`rows`: the functions
of `token_logprobs` and `token_logprobs_grad`, or of `eager`). The logits of a tile are overwritten by

    P~ = d logp / d x = (onehot - p) * dz/dx          (C, V)

from which, with the gradient g = dL/dlogp of each token,

    dhidden = g * (P~ @ weight)     dweight = P~.T @ (g * hidden)     dbias = P~.T @ g

P~ is formed as soon as its logits are there, before g is known: g multiplies the small operands. (In half precision
g * p would underflow besides.) In float16 P~ itself would, where a token is almost certain: such a row is lifted by a
power of two that g is divided by.

FLOPs, counting a product of (N, D) with (D, V) as 2NDV: `fwd` 2; `fwd_with_hidden_grad` 4, and nothing in the backward;
`fwd_keeping` 2, then 4 (`tile_bwd`) for a token whose P~ was kept and 6 (`bwd`) for one whose logits are formed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Columns of logits in one product on a CPU. BLAS is 10 to 25% faster on a wide, flat product cut into such slabs (228
# and 341 rows, D=576, V=49152, two cores: 129 -> 164 and 151 -> 176 GFLOP/s) than on the whole.
CPU_SLAB = 2048
# Bytes of weight that are cast at a time where its dtype is not that of the products: small beside a tile, and large
# enough for a product at full speed.
CAST_BYTES = 1 << 26


def row_stride(vocabulary: int) -> int:
    """Elements from one row of logits to the next in our buffers: for an odd V (50257, 32001, ...) some more than V.

    Tensor cores take rows that begin at 16 bytes; cuBLAS leaves them, or copies, where they do not.
    """
    return vocabulary if vocabulary % 8 == 0 or vocabulary < 1024 else -(-vocabulary // 64) * 64


@dataclass(frozen=True)
class Head:
    """A language-model head and how its logits are read.

    weight   (V, D), any floating dtype
    bias     (V,) or None
    dtype    of hidden states, logits and products
    options  of the row kernels: ignore_index, temperature, softcap, logit_scale
    rows     what has the row kernels as attributes
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    options: dict[str, Any]
    rows: Any

    def buffer(self, rows: int) -> Tensor:
        """Uninitialized logits (rows, V)."""
        vocabulary = self.weight.shape[0]
        whole = torch.empty(rows, row_stride(vocabulary), dtype=self.dtype, device=self.weight.device)
        return whole[:, :vocabulary]

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns of the logits, their rows of the weight in the dtype of the products)."""
        vocabulary, width = self.weight.shape
        columns = vocabulary if self.weight.is_cuda else CPU_SLAB
        if self.weight.dtype != self.dtype:
            columns = min(columns, max(1, CAST_BYTES // max(1, width * self.dtype.itemsize)))
        for start in range(0, vocabulary, columns):
            part = slice(start, start + columns)
            yield part, self.weight[part].to(self.dtype)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden @ weight.T + bias into `out`, hidden (C, D), out (C, V)."""
        for columns, weight in self.slabs():
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=out[:, columns])
            else:
                torch.addmm(self.bias[columns].to(self.dtype), hidden, weight.t(), out=out[:, columns])
        return out

    def times_weight(self, p: Tensor, out: Tensor) -> None:
        """out = p @ weight, p (C, V), out (C, D); over slabs it is summed in float32 or better."""
        if self.weight.dtype == self.dtype:
            torch.mm(p, self.weight, out=out)
            return
        total = torch.zeros(out.shape, dtype=accumulator(self.dtype), device=out.device)
        for columns, weight in self.slabs():
            product(total, p[:, columns], weight, add=True)
        out.copy_(total)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over several products: many bfloat16 terms would lose digits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b where `add`, summed in float32 or better and rounded to the dtype of out."""
    same = a.dtype == out.dtype
    if same and (a.is_cuda or a.dtype == accumulator(a.dtype)):
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32 and not same and a.dtype != torch.float64:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # no such mixed product: rows of the result at a time, so that the casts stay small
        dtype = torch.promote_types(accumulator(a.dtype), accumulator(out.dtype))
        b = b.to(dtype)
        for start in range(0, out.shape[0], CPU_SLAB):
            part = slice(start, start + CPU_SLAB)
            value = torch.mm(a[part].to(dtype), b)
            out[part] = out[part] + value if add else value


def exponents(sizes: Tensor) -> Tensor:
    """The least x with sizes <= 2**x, in the dtype of `sizes`, which are not negative; 0 where one is no number."""
    lowest = -100.0  # 2**-x is then far from what float32 cannot hold
    return sizes.log2().ceil().nan_to_num(0.0, 0.0, lowest).clamp(lowest, -lowest)


class HeadGrads:
    """dweight and dbias of a head, summed over `tiles` tiles.

    One tile alone writes the gradient in the dtype of the weight; the sum over several runs in float32 (float64 for
    float64 weights) and is cast by the caller.

    Products are added to `weight_into` (V, D), what the weight's gradient holds already, where that is as exact as a
    sum apart: it is float32 or better, or there is one tile. Then it is `weight` itself.

    With `before_scale`, of gradients that are still to be multiplied by a loss scale: float16 could not hold them. Then
    the sum is float32 even over one tile, and lacks a factor of 2**exponent, chosen so that the largest gradient of a
    token is about 1. Where a later chunk has a larger one, the sum is made smaller: in float16 that is a pass over the
    head for each chunk, for nobody waits to see whether it is needed.
    """

    def __init__(
        self, head: Head, *, weight: bool, bias: bool, tiles: int, before_scale: bool = False,
        weight_into: Tensor | None = None,
    ):  # fmt: skip
        self._lifting = before_scale and head.dtype == torch.float16

        def empty(like: Tensor) -> Tensor:
            dtype = like.dtype if tiles == 1 and not before_scale else accumulator(like.dtype)
            return torch.empty(like.shape, dtype=dtype, device=like.device)

        self._into = weight_into is not None and (tiles <= 1 or weight_into.dtype == accumulator(weight_into.dtype))
        if self._into:
            self.weight = weight_into
        else:
            self.weight = empty(head.weight) if weight else None
        self.bias = empty(head.bias) if bias and head.bias is not None else None
        self._added = 0
        self._exponent: Tensor | None = None
        if tiles == 0:
            for total in (None if self._into else self.weight, self.bias):
                if total is not None:
                    total.zero_()

    def make_room(self, grad: Tensor) -> None:
        """For tiles with these gradients of tokens (C,), before they are added."""
        if not self._lifting or grad.shape[0] == 0:
            return
        exponent = exponents(grad.abs().amax())
        if self._exponent is not None:
            exponent = torch.maximum(exponent, self._exponent)
            if self._added:
                for total in (self.weight, self.bias):
                    if total is not None:
                        total.mul_((self._exponent - exponent).exp2())
        self._exponent = exponent

    def lacking(self) -> Tensor | float:
        """The factor that the sums lack."""
        return 1.0 if self._exponent is None else self._exponent.exp2()

    def add(self, p: Tensor, hidden: Tensor, grad: Tensor) -> None:
        """dweight += p.T @ (grad * hidden); dbias += p.T @ grad. p (C, V), hidden (C, D), grad (C,)."""
        if p.shape[0] == 0:  # no tile: `tiles` did not count it
            return
        if self._exponent is not None:
            grad = grad * (-self._exponent).exp2()
        if self.weight is not None:
            scaled = torch.mul(hidden, grad.unsqueeze(1), out=torch.empty_like(hidden))
            product(self.weight, p.t(), scaled, add=self._into or self._added > 0)
        if self.bias is not None:
            product(self.bias.unsqueeze(1), p.t(), grad.to(p.dtype).unsqueeze(1), add=self._added > 0)
        self._added += 1


def tiles(start: int, end: int, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices that cover rows [start, end), of sizes as equal as can be, each with its part of the buffer (C, V)."""
    n = end - start
    count = -(-n // max(1, buffer.shape[0]))
    for i in range(count):
        rows = slice(start + n * i // count, start + n * (i + 1) // count)
        yield rows, buffer[: rows.stop - rows.start]


def tile_count(n: int, kept: int, tile: int) -> int:
    """How many times `bwd` adds to the head's gradients."""
    return (kept > 0) + -(-(n - kept) // tile)


class RowResults:
    """logps (N,), statistics (4, N) or (0, N), and norms (2, N) where the logits may be formed again.

    Of rows that became P~ `scale`, the first row of norms, holds the factor that P~ lacks: it goes into dL/dlogp.
    """

    def __init__(self, hidden: Tensor, stats: bool):
        n, dtype, device = hidden.shape[0], accumulator(hidden.dtype), hidden.device
        self.logps = torch.empty(n, dtype=dtype, device=device)
        self.norms = torch.zeros((2, n), dtype=dtype, device=device)
        self.scale = self.norms[0]
        self.stats = torch.empty((4 if stats else 0, n), dtype=dtype, device=device)

    def forward(self, rows: slice, x: Tensor, labels: Tensor, head: Head) -> None:
        """Of these rows, whose logits are x (C, V)."""
        stats = self.stats.shape[0] > 0
        self.logps[rows], self.norms[:, rows], values = head.rows.token_logprobs_fwd(
            x, labels, stats=stats, **head.options
        )
        if values is not None:
            self.stats[:, rows] = values

    def forward_to_gradient(self, rows: slice, x: Tensor, labels: Tensor, head: Head) -> None:
        """The same, and x becomes P~, which still lacks the factor `scale` of each row."""
        stats = self.stats.shape[0] > 0
        self.logps[rows], scale, values = head.rows.token_logprobs_fwd_grad(x, labels, stats=stats, **head.options)
        self.scale[rows] = 1.0 if scale is None else scale
        if values is not None:
            self.stats[:, rows] = values


def fwd(
    hidden: Tensor, labels: Tensor, head: Head, results: RowResults, buffer: Tensor, *, start: int = 0,
    end: int | None = None,
) -> None:  # fmt: skip
    """Log-probs of rows [start, end): 2NDV FLOPs."""
    for rows, x in tiles(start, hidden.shape[0] if end is None else end, buffer):
        results.forward(rows, head.logits(hidden[rows], x), labels[rows], head)


def fwd_with_hidden_grad(hidden: Tensor, labels: Tensor, head: Head, results: RowResults, buffer: Tensor) -> Tensor:
    """Log-probs; returns u = dlogp/dhidden (N, D), all that a frozen head's backward needs: 4NDV FLOPs."""
    u = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    for rows, x in tiles(0, hidden.shape[0], buffer):
        results.forward_to_gradient(rows, head.logits(hidden[rows], x), labels[rows], head)
        head.times_weight(x, u[rows])
    return u


def fwd_keeping(
    hidden: Tensor, labels: Tensor, head: Head, results: RowResults, buffer: Tensor, *, kept: int
) -> Tensor:
    """Log-probs; returns P~ (kept, V) of the first `kept` rows, in memory of their own: 2NDV FLOPs."""
    p = head.buffer(kept)
    if kept:
        rows = slice(0, kept)
        results.forward_to_gradient(rows, head.logits(hidden[rows], p), labels[rows], head)
    fwd(hidden, labels, head, results, buffer, start=kept)
    return p


def bwd(
    hidden: Tensor, labels: Tensor, norms: Tensor, grad: Tensor, head: Head, grads: HeadGrads, dhidden: Tensor | None,
    buffer: Tensor, *, lift: Tensor | None = None, start: int = 0, end: int | None = None, scaled: bool = True,
) -> None:  # fmt: skip
    """Forms the logits of rows [start, end) again, writes their dhidden, adds to the head's gradients: up to 6NDV.

    norms (2, N) are those of the forward, grad (N,) = dL/dlogps, over `lift` (N,) where P~ is to be formed with that
    factor; `scaled` as in `tile_bwd`.
    """
    for rows, x in tiles(start, hidden.shape[0] if end is None else end, buffer):
        head.logits(hidden[rows], x)
        factor = torch.ones_like(norms[0, rows]) if lift is None else lift[rows]
        head.rows.token_logprobs_bwd(x, labels[rows], norms[:, rows], factor, out=x, **head.options)
        tile_bwd(rows, x, hidden, grad, head, grads, dhidden, scaled=scaled)


def tile_bwd(
    rows: slice, p: Tensor, hidden: Tensor, grad: Tensor, head: Head, grads: HeadGrads, dhidden: Tensor | None, *,
    scaled: bool = True,
) -> None:  # fmt: skip
    """From P~ (C, V) of these rows: dhidden = grad * (P~ @ weight) is written, the head's gradients are added to.

    Where not `scaled`, dhidden is written without the factor of grad.
    """
    if dhidden is not None:
        head.times_weight(p, dhidden[rows])
        if scaled:
            dhidden[rows].mul_(grad[rows].unsqueeze(1))
    grads.add(p, hidden[rows], grad[rows])
