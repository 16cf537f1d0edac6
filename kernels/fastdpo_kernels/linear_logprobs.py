"""Log-probs from hidden states, a tile of logits at a time.

    x = hidden @ weight.T + bias                      (N, V), never whole: C rows at a time
    logp_i = log softmax(z(x_i))[label_i]             z: scale, softcap, temperature, as in token_logprobs

The matrix products stay with the BLAS of the device; only the softmax work on a tile is ours (`rows`: the module
`token_logprobs` or `eager`). One tile buffer serves all tiles: its logits are overwritten by

    P~ = d logp / d x = (onehot - p) * dz/dx          (C, V)

from which, with the gradient g = dL/dlogp of each token,

    dhidden = g * (P~ @ weight)     dweight = P~.T @ (g * hidden)     dbias = P~.T @ g

g multiplies the small operands, not P~: in half precision g * p would underflow, and with g out of P~ the product
u = P~ @ weight can be formed before g is known.

FLOPs, counting a product of (N, D) with (D, V) as 2NDV: forward 2, `fwd_with_hidden_grad` 4, `bwd` 6.
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


@dataclass(frozen=True)
class Head:
    """A language-model head and how its logits are read. `rows` is the module with the row kernels."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    options: dict[str, Any]
    rows: Any

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """hidden @ weight.T + bias into the first rows of `buffer` (C, V)."""
        out = buffer[: hidden.shape[0]]
        vocabulary = self.weight.shape[0]
        slab = vocabulary if hidden.is_cuda else CPU_SLAB
        for start in range(0, vocabulary, slab):
            part = slice(start, start + slab)
            if self.bias is None:
                torch.mm(hidden, self.weight[part].t(), out=out[:, part])
            else:
                torch.addmm(self.bias[part], hidden, self.weight[part].t(), out=out[:, part])
        return out

    def buffer(self, hidden: Tensor, tile: int) -> Tensor:
        return hidden.new_empty((min(tile, hidden.shape[0]), self.weight.shape[0]))


@dataclass
class HeadGrads:
    """Sums over tiles, in float32 (float64 for float64 weights): sums of many bfloat16 products lose digits."""

    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, head: Head, weight: bool, bias: bool) -> HeadGrads:
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        dw = torch.zeros(head.weight.shape, dtype=dtype, device=head.weight.device) if weight else None
        db = torch.zeros(head.weight.shape[0], dtype=dtype, device=head.weight.device) if bias else None
        return cls(dw, db)

    def add(self, p: Tensor, scaled_hidden: Tensor, grad: Tensor) -> None:
        """dweight += p.T @ scaled_hidden; dbias += p.T @ grad. p (C, V), scaled_hidden (C, D), grad (C,)."""
        if self.weight is not None:
            _add_product(self.weight, p.t(), scaled_hidden)
        if self.bias is not None:
            _add_product(self.bias.unsqueeze(1), p.t(), grad.to(p.dtype).unsqueeze(1))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in the dtype of `total`."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # no mixed-precision product on CPU: a slab of the vocabulary at a time keeps the float32 copies small
        b = b.to(total.dtype)
        for start in range(0, total.shape[0], CPU_SLAB):
            part = slice(start, start + CPU_SLAB)
            torch.addmm(total[part], a[part].to(total.dtype), b, out=total[part])


def tiles(n: int, tile: int) -> Iterator[slice]:
    """Slices of at most `tile` rows that cover n rows, of sizes as equal as can be."""
    count = -(-n // tile)
    for i in range(count):
        yield slice(n * i // count, n * (i + 1) // count)


def fwd(
    hidden: Tensor, labels: Tensor, head: Head, *, tile: int, stats: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logps (N,), log-sum-exp (N,), statistics (4, N) or None. 2NDV FLOPs, one tile of memory."""
    buffer, parts = head.buffer(hidden, tile), []
    for part in tiles(hidden.shape[0], tile):
        x = head.logits(hidden[part], buffer)
        parts.append(head.rows.token_logprobs_fwd(x, labels[part], stats=stats, **head.options))
    return _join(parts, hidden, stats)


def fwd_with_hidden_grad(
    hidden: Tensor, labels: Tensor, head: Head, *, tile: int, stats: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logps (N,), u = dlogp/dhidden (N, D), statistics or None: all that a frozen head's backward needs. 4NDV FLOPs."""
    buffer, parts = head.buffer(hidden, tile), []
    u = torch.empty_like(hidden)
    for part in tiles(hidden.shape[0], tile):
        x = head.logits(hidden[part], buffer)
        logps, lse, tile_stats = head.rows.token_logprobs_fwd(x, labels[part], stats=stats, **head.options)
        torch.mm(to_gradient(x, labels[part], lse, head), head.weight, out=u[part])
        parts.append((logps, lse, tile_stats))
    logps, _, all_stats = _join(parts, hidden, stats)
    return logps, u, all_stats


def bwd(
    hidden: Tensor, labels: Tensor, lse: Tensor, grad: Tensor, head: Head, grads: HeadGrads, *, tile: int,
    dhidden: Tensor | None,
) -> None:  # fmt: skip
    """Forms each tile again and adds to `grads`; writes `dhidden` (N, D) where it is given. Up to 6NDV FLOPs."""
    buffer = head.buffer(hidden, tile)
    for part in tiles(hidden.shape[0], tile):
        x = head.logits(hidden[part], buffer)
        p = to_gradient(x, labels[part], lse[part], head)
        tile_bwd(p, hidden[part], grad[part], head, grads, None if dhidden is None else dhidden[part])


def to_gradient(x: Tensor, labels: Tensor, lse: Tensor, head: Head) -> Tensor:
    """Overwrites the logits x (C, V) by P~ = dlogp/dx; rows of ignored labels become zero."""
    return head.rows.token_logprobs_bwd(x, labels, lse, torch.ones_like(lse), out=x, **head.options)


def tile_bwd(p: Tensor, hidden: Tensor, grad: Tensor, head: Head, grads: HeadGrads, dhidden: Tensor | None) -> None:
    """From P~ (C, V) and g (C,): dhidden = g * (P~ @ weight), and the head's gradients."""
    g = grad.unsqueeze(1)
    if dhidden is not None:
        torch.mm(p, head.weight, out=dhidden)
        dhidden.mul_(g)
    if grads.weight is not None or grads.bias is not None:
        grads.add(p, (hidden * g).to(p.dtype), grad)


def _join(
    parts: list[tuple[Tensor, Tensor, Tensor | None]], hidden: Tensor, stats: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not parts:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        empty = torch.zeros(0, dtype=dtype, device=hidden.device)
        return empty, empty, torch.zeros((4, 0), dtype=dtype, device=hidden.device) if stats else None
    all_stats = torch.cat([part[2] for part in parts if part[2] is not None], dim=1) if stats else None
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), all_stats
