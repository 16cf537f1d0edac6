"""bf16 in Triton's interpreter after `triton_interpreter.mend()`; on a GPU the same kernels run on the device."""

import pytest
import torch
import triton_interpreter

triton = pytest.importorskip("triton")
tl = triton.language

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_interpreter.mend()


@triton.jit
def cast_kernel(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def dot_kernel(a, b, c, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    square = i[:, None] * SIZE + i[None, :]
    tl.store(c + square, tl.dot(tl.load(a + square), tl.load(b + square)))


def test_casts_to_bf16_round_to_nearest_even():
    triton_interpreter.mend()  # a second time changes nothing
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[:512] = (bits[:512] & ~0xFFFF) | 0x8000  # ties
    bits[512:516] = torch.tensor(
        [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x3F80FFFF]
    )  # largest, inf, NaN, just below a step
    x = bits.view(torch.float32).to(DEVICE)
    y = torch.zeros(4096, dtype=torch.bfloat16, device=DEVICE)
    cast_kernel[(1,)](x, y, SIZE=4096)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_dot_of_bf16_multiplies_the_numbers():
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    c = torch.zeros(32, 32, device=DEVICE)
    dot_kernel[(1,)](a, b, c, SIZE=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
