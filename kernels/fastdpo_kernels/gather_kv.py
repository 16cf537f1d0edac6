"""Keys and values gathered for attention over shared prefixes, in Triton: one kernel forward, one backward.

A packed row has T tokens, and attention wants K >= T rows of keys and values, those of a shared prompt once for each
completion:

    gathered[k] = x[index[k]]                                   for the keys and the values x
    x_grad[t] = sum_i gathered_grad[copies[i]]                  over offsets[t] <= i < offsets[t + 1]

`copies` and `offsets` are the inverse of `index`: a stable argsort of it, and the cumulated counts of each row. So the
backward gathers as well. It adds in float32 in the order of `copies` and rounds once, where the usual scatter adds in
the dtype of the gradients, in the order in which its atomic operations arrive. `fastdpo_kernels.eager` has the same
functions in plain PyTorch.

A program serves a tile of rows and columns of both tensors, where a column is an element of a row's H heads of size d.
In the backward these are few rows, so one of hundreds of copies (a token at the beginning of everything) holds up no
others but those: it stands at the beginning of the packed row, too, and the other programs run beside it.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not measured: no GPU has run these numbers yet; they come from counting. A thread of the forward has four 128-bit
# loads of bf16 in flight for the keys and four for the values. One of the backward has one of each for two copies,
# which is what most rows have, at 70 registers (sm_90): seven programs fit on a multiprocessor, each with up to 12 KiB
# to move while it waits three times for the memory, which is then the one that is behind.
FORWARD_TILE = 4096
BACKWARD_TILE = 1024
SMALLEST_COLUMNS, LARGEST_COLUMNS = 128, 1024
NUM_WARPS = 4
FIRST_COPIES = tl.constexpr(2)
COPIES_A_ROUND = tl.constexpr(4)


@triton.jit
def _places(columns, head_stride, D: tl.constexpr, VECTOR: tl.constexpr):
    """Where the columns of a row stand behind its first element. Strides are counted in vectors."""
    # The product with the vector comes last, so that the compiler sees that a vector is split by no head.
    return (columns // D).to(tl.int64) * head_stride * VECTOR + columns % D


_INTEGERS = ["num_rows", "heads", "key_row_stride", "key_head_stride", "value_row_stride", "value_head_stride"]


@triton.jit(do_not_specialize=_INTEGERS)
def _gather_kv_fwd_kernel(
    key,  # (T, H, D)
    value,  # (T, H, DV)
    index,  # (K,)
    gathered_key,  # (K, H, D)
    gathered_value,  # (K, H, DV)
    num_rows,
    heads,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY_VECTOR: tl.constexpr,
    VALUE_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = k < num_rows
    rows = tl.load(index + k, mask=inside, other=0)[:, None]  # (ROWS, 1)
    k, inside = k[:, None], inside[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    key_inside, value_inside = inside & (columns < heads * D), inside & (columns < heads * DV)
    key += rows * key_row_stride * KEY_VECTOR + _places(columns, key_head_stride, D, KEY_VECTOR)
    value += rows * value_row_stride * VALUE_VECTOR + _places(columns, value_head_stride, DV, VALUE_VECTOR)
    # All loads before the first store: nobody tells the compiler that they cannot overlap.
    x, y = tl.load(key, mask=key_inside), tl.load(value, mask=value_inside)  # (ROWS, COLUMNS)
    tl.store(gathered_key + k * heads * D + columns, x, mask=key_inside)
    tl.store(gathered_value + k * heads * DV + columns, y, mask=value_inside)


@triton.jit
def _add_copies(
    key_sum,  # (ROWS, COLUMNS)
    value_sum,  # (ROWS, COLUMNS)
    grad_key,
    grad_value,
    copies,  # (ROWS,)
    first,
    count,  # (ROWS,)
    key_row_stride,
    value_row_stride,
    key_columns,
    value_columns,
    KEY_VECTOR: tl.constexpr,
    VALUE_VECTOR: tl.constexpr,
    COPIES: tl.constexpr,
):
    """The sums and, one after the other, as many copies from the first on; what a row does not have is not read."""
    for i in tl.static_range(COPIES):
        there = first + i < count
        k = tl.load(copies + first + i, mask=there, other=0)[:, None]  # (ROWS, 1)
        there = there[:, None]
        x = tl.load(grad_key + k * key_row_stride * KEY_VECTOR, mask=there & key_columns, other=0.0)
        y = tl.load(grad_value + k * value_row_stride * VALUE_VECTOR, mask=there & value_columns, other=0.0)
        key_sum += x.to(tl.float32)
        value_sum += y.to(tl.float32)
    return key_sum, value_sum


@triton.jit(do_not_specialize=_INTEGERS)
def _gather_kv_bwd_kernel(
    grad_key,  # (K, H, D)
    grad_value,  # (K, H, DV)
    copies,  # (K,)
    offsets,  # (T + 1,)
    key_grad,  # (T, H, D)
    value_grad,  # (T, H, DV)
    num_rows,
    heads,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY_VECTOR: tl.constexpr,
    VALUE_VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = t < num_rows
    begin = tl.load(offsets + t, mask=inside, other=0)  # (ROWS,)
    count = tl.load(offsets + t + 1, mask=inside, other=0) - begin
    most = tl.max(count, axis=0)
    copies += begin
    t, inside = t[:, None], inside[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    key_columns, value_columns = columns < heads * D, columns < heads * DV
    grad_key += _places(columns, key_head_stride, D, KEY_VECTOR)
    grad_value += _places(columns, value_head_stride, DV, VALUE_VECTOR)
    key_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    value_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    # The first copies are no round of the loop: in a loop the assembler spares registers, and makes loads wait for one
    # another.
    key_sum, value_sum = _add_copies(
        key_sum, value_sum, grad_key, grad_value, copies, 0, count, key_row_stride, value_row_stride,
        key_columns, value_columns, KEY_VECTOR, VALUE_VECTOR, FIRST_COPIES,
    )  # fmt: skip
    for first in range(FIRST_COPIES, most, COPIES_A_ROUND):
        key_sum, value_sum = _add_copies(
            key_sum, value_sum, grad_key, grad_value, copies, first, count, key_row_stride, value_row_stride,
            key_columns, value_columns, KEY_VECTOR, VALUE_VECTOR, COPIES_A_ROUND,
        )  # fmt: skip
    key_sum, value_sum = key_sum.to(key_grad.dtype.element_ty), value_sum.to(value_grad.dtype.element_ty)
    tl.store(key_grad + t * heads * D + columns, key_sum, mask=inside & key_columns)
    tl.store(value_grad + t * heads * DV + columns, value_sum, mask=inside & value_columns)


def _unit_stride(x: Tensor) -> Tensor:
    """x (rows, H, d) itself where the elements of a head are neighbours, else a copy."""
    return x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()


def _vector(x: Tensor) -> int:
    """Elements of the longest vector, of 16 bytes at most, that every head of x (rows, H, d) is a whole number of."""
    parts = (x.stride(0), x.stride(1), x.shape[2])
    return math.gcd(16, x.data_ptr(), *(part * x.element_size() for part in parts)) // x.element_size()


def _block(heads: int, d: int, dv: int) -> int:
    """Columns of a tile: a power of two that, if it can, leaves none of its lanes without a column."""
    fitting = max(SMALLEST_COLUMNS, math.gcd(heads * d, heads * dv, LARGEST_COLUMNS))
    return min(fitting, triton.next_power_of_2(heads * max(d, dv)))


def _launch(
    kernel: Any, key: Tensor, value: Tensor, places: tuple[Tensor, ...], num_rows: int, tile: int
) -> tuple[Tensor, Tensor]:
    """What the kernel makes of key (rows, H, d) and value (rows, H, dv): num_rows of each, contiguous."""
    assert key.dtype in (torch.bfloat16, torch.float16, torch.float32), key.dtype
    (_, heads, d), (_, _, dv) = key.shape, value.shape
    assert key.dtype == value.dtype and key.shape[:2] == value.shape[:2] and min(heads, d, dv) > 0
    made_key, made_value = key.new_empty(num_rows, heads, d), value.new_empty(num_rows, heads, dv)
    if num_rows > 0:
        key, value = _unit_stride(key), _unit_stride(value)
        key_vector, value_vector = _vector(key), _vector(value)
        columns = _block(heads, d, dv)
        rows = tile // columns
        with torch.cuda.device_of(key):  # Triton launches on the current device; a no-op for CPU tensors
            kernel[triton.cdiv(num_rows, rows), triton.cdiv(heads * max(d, dv), columns)](
                key,
                value,
                *(place.contiguous() for place in places),
                made_key,
                made_value,
                num_rows,
                heads,
                key.stride(0) // key_vector,
                key.stride(1) // key_vector,
                value.stride(0) // value_vector,
                value.stride(1) // value_vector,
                D=d,
                DV=dv,
                KEY_VECTOR=key_vector,
                VALUE_VECTOR=value_vector,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=NUM_WARPS,
            )
    return made_key, made_value


def gather_kv_fwd(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(key.index_select(0, index), value.index_select(0, index)), bit for bit.

    key (T, H, d), value (T, H, dv) bf16, fp16 or fp32, one dtype, any strides; index (K,) int64 in [0, T), which is not
    checked. Returns (K, H, d) and (K, H, dv), contiguous.
    """
    assert index.dim() == 1 and index.dtype == torch.int64
    return _launch(_gather_kv_fwd_kernel, key, value, (index,), len(index), FORWARD_TILE)


def gather_kv_bwd(grad_key: Tensor, grad_value: Tensor, copies: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """For both gradients x: out[t] = x.float()[copies[offsets[t] : offsets[t + 1]]].sum(0), rounded to the dtype of x.

    grad_key (K, H, d), grad_value (K, H, dv) bf16, fp16 or fp32, one dtype, any strides; copies (K,) int64 in [0, K)
    and offsets (T + 1,) int64, ascending from 0 to K, which is not checked. Returns (T, H, d) and (T, H, dv),
    contiguous. Added in the order of `copies`: the same numbers every time. A row without copies gets zeros.
    """
    assert copies.shape == grad_key.shape[:1] and copies.dtype == torch.int64
    assert offsets.dim() == 1 and len(offsets) > 0 and offsets.dtype == torch.int64
    return _launch(_gather_kv_bwd_kernel, grad_key, grad_value, (copies, offsets), len(offsets) - 1, BACKWARD_TILE)
