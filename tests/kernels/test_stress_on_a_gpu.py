"""The one-pass kernel, over and over on many rows: the same bits every time, and the numbers of the two-pass kernels.

What a missing barrier does shows in one row of thousands, and only on a device: hence a million rows.
"""

import pytest
import torch

pytest.importorskip("triton")

import triton_interpreter

triton_interpreter.mend()

from fastdpo_kernels.token_logprobs import token_logprobs_bwd, token_logprobs_fwd  # noqa: E402
from fastdpo_kernels.token_logprobs_grad import LIMIT, token_logprobs_fwd_grad  # noqa: E402

V = 50257  # odd: rows begin at any address, so that all have edges
LOWEST, HIGHEST = -100.0, -30.0
ROWS, CHUNK, REPEATS = 1 << 20, 1 << 15, 3


def draw(rows, v, device, dtype):
    """Logits and labels; every second row rises, so that the kernel has to move its anchor again and again."""
    logits = torch.empty(rows, v, dtype=dtype, device=device).uniform_(LOWEST, HIGHEST)
    rising = torch.linspace(LOWEST, HIGHEST, v, device=device)
    logits[::2] = (0.9 * rising + 0.1 * logits[::2]).to(dtype)
    return logits, torch.randint(v, (rows,), device=device)


def check(rows, v, device, dtype):
    logits, labels = draw(rows, v, device, dtype)
    runs = []
    for _ in range(REPEATS):
        gradient = logits.clone()
        logps, scales, stats = token_logprobs_fwd_grad(gradient, labels, stats=True)
        runs.append((logps, scales, stats, gradient))
        for got, first in zip(runs[-1], runs[0], strict=True):
            assert torch.equal(got, first)
        del runs[1:]
    logps, scales, stats, gradient = runs[0]
    expected, norms, expected_stats = token_logprobs_fwd(logits, labels, stats=True)
    ones = torch.ones(rows, device=device)
    wanted = token_logprobs_bwd(logits, labels, norms, ones, out=logits)
    # Of float32: sums of v terms, and logits of up to 100.
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats, expected_stats, rtol=1e-4, atol=1e-3)
    # Both round to the dtype, and what was written before the anchor moved is rounded again each time.
    moves = 2 + (HIGHEST - LOWEST) / LIMIT.value
    relative = moves * torch.finfo(dtype).eps + 1e-4
    for part in (slice(start, start + 256) for start in range(0, rows, 256)):  # in float32, a part at a time
        found = scales[part, None] * gradient[part].float()
        torch.testing.assert_close(found, wanted[part].float(), rtol=relative, atol=1e-30)


@pytest.mark.device
def test_the_check_itself():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(3, V // 8, device, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_million_rows(dtype):
    torch.manual_seed(0)
    chunk = CHUNK * 2 // dtype.itemsize
    total = ROWS if dtype == torch.bfloat16 else ROWS // 8
    for _ in range(total // chunk):
        check(chunk, V, "cuda", dtype)
