"""One row of logits in Triton: how it is read, and the transform from logits x to z.

Memory moves 128 bits at a time for every V and row stride. A row is split at the 16-byte boundaries within it,

    | lead | body, whole 16-byte vectors | tail |         lead, tail: less than a vector each, together the edges

the body is read in blocks of (LOADS, THREADS, vector) elements, and the edges are one small block of their own. A
thread holds LOADS vectors of a block, so that as many loads are in flight, and reductions over the first and last
dimension stay within the thread. Only the last block of a body has a mask.

With s = logit_scale, T = temperature, c = softcap:

    z = c tanh(s x / c) / T = outer tanh(inner x)        (without softcap: z = s x / T = outer x)

exp2 is one instruction where exp is four, so sums are of 2^t, with t = z log2(e) - n for an anchor n. One rounding,
that of a fused multiply-add, separates t from x: what n itself was rounded by is common to a row and cancels.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not measured: no GPU has run these numbers yet. 128 threads are a row's program, and a block has 32 columns for each:
# four loads of bf16 in flight. A multiprocessor that holds eight rows then has 64 KiB under way, more than the product
# of latency and bandwidth asks for.
THREADS = 128
COLUMNS_OF_THREAD = 32

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))

# Where a factor 2^t has underflowed to 0, t itself may be -inf; no lower than this, 0 * t is 0 and not NaN.
FLOOR = tl.constexpr(-1000.0)

# How z follows from x: without softcap; with it, by a division, which has an absolute error of 1.3e-7 outer nats; or by
# a polynomial besides, for small arguments, which has a relative one.
LINEAR = tl.constexpr(0)
DIVISION = tl.constexpr(1)
POLYNOMIAL = tl.constexpr(2)

# Up to this `outer` the error of DIVISION, 4e-6 nats, is nothing beside the rounding of bfloat16 logits.
LARGEST_OUTER = 32.0


class Transform(NamedTuple):
    """z = outer tanh(inner x), or outer x where LINEAR, of x or, with `FLIP`, of -x."""

    inner: float
    outer: float
    slope: float
    KIND: int
    FLIP: bool

    def signed(self) -> tuple[float, float]:
        """(inner, outer) for x as it is: one of them is negative where `FLIP`."""
        sign = -1.0 if self.FLIP else 1.0
        return (self.inner, self.outer * sign) if LINEAR.value == self.KIND else (self.inner * sign, self.outer)


def transform_of(dtype: torch.dtype, temperature: float, softcap: float | None, logit_scale: float) -> Transform:
    """The transform of logits of this dtype; `slope` is dz/dx at 0. inner and outer are not negative."""
    slope, flip = logit_scale / temperature, logit_scale < 0
    if softcap is None:
        return Transform(1.0, abs(slope), slope, LINEAR.value, flip)
    outer = softcap / temperature
    kind = DIVISION if dtype == torch.bfloat16 and outer <= LARGEST_OUTER else POLYNOMIAL
    return Transform(abs(logit_scale) / softcap, outer, slope, kind.value, flip)


def loads(dtype: torch.dtype, *, heavy: bool) -> int:
    """Vectors of a block that a thread holds; half as many where it would otherwise run out of registers."""
    columns = COLUMNS_OF_THREAD // 2 if heavy else COLUMNS_OF_THREAD
    return columns * dtype.itemsize // 16


def num_warps() -> int:
    """Warps of a program of THREADS threads on the current device."""
    if triton.knobs.runtime.interpret:
        return 4
    return THREADS // triton.runtime.driver.active.get_current_target().warp_size


@triton.jit
def tanh(y):
    """tanh(y) in float32 to about 2 ulp; libdevice is absent on some backends and in the interpreter."""
    e = tl.exp2(tl.abs(y) * (-2.0 * LOG2_E))
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
def bounded(x, inner, KIND: tl.constexpr):
    """What `log2_z` and `slope` are made of: x, or 1 / (1 + exp(2 inner x)) = (1 - tanh(inner x)) / 2, or the tanh."""
    if KIND == DIVISION:
        return 1.0 / (1.0 + tl.exp2(x * (inner * (2.0 * LOG2_E))))
    elif KIND == POLYNOMIAL:
        return tanh(inner * x)
    else:
        return x


@triton.jit
def log2_z(b, outer2, n, KIND: tl.constexpr):
    """t = z log2(e) - n of b = bounded(x), with outer2 = outer log2(e)."""
    if KIND == DIVISION:
        return tl.fma(b, -2.0 * outer2, outer2 - n)
    else:
        return tl.fma(b, outer2, -n)


@triton.jit
def natural_z(b, outer, KIND: tl.constexpr):
    """z of b = bounded(x)."""
    if KIND == DIVISION:
        return tl.fma(b, -2.0 * outer, outer)
    else:
        return outer * b


@triton.jit
def relative_slope(b, KIND: tl.constexpr):
    """dz/dx over its value at 0: 1 - tanh^2."""
    if KIND == DIVISION:
        return 4.0 * (b - b * b)
    elif KIND == POLYNOMIAL:
        return 1.0 - b * b
    else:
        return 1.0


@triton.jit
def log_prob(label_t, label_z, log_sum):
    """t log 2 - log_sum of the label, and z itself where t is too large for float32. NaN stays."""
    logp = tl.fma(label_t, LN_2, -log_sum)
    logp = tl.where(logp == -float("inf"), label_z, logp)
    # Rounding must not lift it above 0: of a token that is certain, log(1 - p) is wanted.
    return tl.where(logp > 0.0, 0.0, logp)


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
def block_columns(VECTORS: tl.constexpr, SIZE: tl.constexpr):
    """(VECTORS, SIZE), 0 to its size: the columns of a block, neighbouring vectors in neighbouring threads."""
    return tl.arange(0, VECTORS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def load_block(block, size, THREADS: tl.constexpr, LOADS: tl.constexpr, MASKED: tl.constexpr, FLIP: tl.constexpr):
    """(LOADS, THREADS, vector) float32 from an address on a boundary; -inf from column `size` on, where MASKED.

    Loaded as (vectors, vector): of three dimensions, some versions of Triton would spread the first over threads.
    """
    if block.dtype.element_ty == tl.bfloat16:
        # Two columns a word: a shift and a mask make them float32, where Triton's own conversion takes three steps.
        i = block_columns(LOADS * THREADS, 4)
        words = block.to(tl.pointer_type(tl.int32))
        if MASKED:
            minus_infinity: tl.constexpr = 0x7F807F80 if FLIP else -0x007F0080
            word = tl.load(words + i, mask=i < size // 2, other=minus_infinity)
        else:
            word = tl.load(words + i)
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & -0x10000).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(first, second), (LOADS, THREADS, 8))
    else:
        VECTOR: tl.constexpr = 128 // block.dtype.element_ty.primitive_bitwidth
        i = block_columns(LOADS * THREADS, VECTOR)
        if MASKED:
            x = tl.load(block + i, mask=i < size, other=float("inf") if FLIP else -float("inf")).to(tl.float32)
        else:
            x = tl.load(block + i).to(tl.float32)
        x = tl.reshape(x, (LOADS, THREADS, VECTOR))
    return 0.0 - x if FLIP else x


@triton.jit
def sum_of_thread(x):
    """(THREADS,) of a block (LOADS, THREADS, vector)."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def product_of_thread(x, y):
    """(THREADS,) sums of x y, of two blocks."""
    return tl.sum(tl.sum(x * y, axis=2), axis=0)


@triton.jit
def max_of_thread(x):
    """(THREADS,) of a block (LOADS, THREADS, vector)."""
    return tl.max(tl.max(x, axis=0), axis=1)


@triton.jit
def edges(row, lead, body, V):
    """Columns of the lead and, after them, of the tail, and which of them there are. At most a vector less one each."""
    i = tl.arange(0, 256 // row.dtype.element_ty.primitive_bitwidth)
    columns = i + tl.where(i < lead, 0, body)
    return columns, columns < V


@triton.jit
def load_one(row, column, inside, FLIP: tl.constexpr):
    """The logit in this column as float32, NaN where it is not inside the row."""
    x = tl.load(row + column, mask=inside, other=float("nan")).to(tl.float32)
    return 0.0 - x if FLIP else x


def has_edges(x: Tensor) -> bool:
    """Whether a row of x (N, V) may begin or end within a 16-byte vector."""
    row_stride, v = x.stride(0) * x.element_size(), x.shape[1] * x.element_size()
    return x.data_ptr() % 16 != 0 or row_stride % 16 != 0 or v % 16 != 0
