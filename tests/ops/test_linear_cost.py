"""What the head costs: FLOPs counted product by product, memory counted tensor by tensor."""

import pytest
import torch
from counting import LiveBytes
from torch.utils.flop_counter import FlopCounterMode

import fastdpo
from fastdpo.ops import budget, library
from fastdpo_kernels import eager, linear_logprobs

N, D, V = 96, 32, 512
ROW = V * 4  # bytes


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def pairs(count=6):
    """sequence_ids of `count` pairs that stand one after the other, N rows in all."""
    ids = torch.arange(count).repeat_interleave(N // count)
    return ids + count * (torch.arange(N) % 2), [N // count] * count


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(budget, "FULL_SPEED_ROWS", 8)
    monkeypatch.setattr(eager, "CPU_CHUNK", ROW)


def per_token(hidden, weight, labels, rows):
    return fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=int(rows * ROW)).sum()


def per_pair(hidden, weight, labels, rows, **options):
    ids, counts = pairs()
    refs = torch.zeros(2 * len(counts))
    return fastdpo.linear_loss(
        hidden, weight, labels, refs, sequence_ids=ids, tokens_per_pair=counts, memory_budget=int(rows * ROW), **options
    ).loss.sum()


def count(function, trained, rows, **options):
    """FLOPs of forward and backward in units of NDV, and which leaves got a gradient."""
    hidden, weight, labels = problem()
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    with FlopCounterMode(display=False) as counter:
        total = function(hidden, weight, labels, rows, **options)
        if trained:
            total.backward()
    return counter.get_total_flops() / (N * D * V)


BOTH = ("hidden", "weight")


@pytest.mark.parametrize(
    "function, trained, rows, expected",
    [
        (per_token, (), 16, 2),
        (per_token, ("hidden",), 16, 4),
        (per_token, BOTH, N, 6),
        (per_token, BOTH, 8, 8),
        (per_token, BOTH, 8 + 48, 8 - 2 * 48 / N),
        (per_token, ("weight",), N, 4),
        (per_token, ("weight",), 8, 6),
        (per_pair, (), 16, 2),
        (per_pair, ("hidden",), 16, 4),
        (per_pair, BOTH, N, 6),
        (per_pair, BOTH, 16, 6),
        (per_pair, BOTH, 5, 8),
        (per_pair, ("weight",), 16, 4),
    ],
)
def test_flops(small_tiles, function, trained, rows, expected):
    assert count(function, trained, rows) == pytest.approx(expected, abs=1e-9)


def test_flops_with_reduction_none_are_those_of_the_token_way(small_tiles):
    assert count(per_pair, BOTH, N, reduction="none") == 6
    assert count(per_pair, BOTH, 8, reduction="none") == 8


@pytest.fixture(scope="module", autouse=True)
def see_inside_operators():
    for operator, function in library._OPERATORS:
        torch.library.register_torch_dispatch(operator, LiveBytes, library._counted(function))


def peak(function, trained, rows, **options):
    """Most bytes alive beyond the inputs, and the bytes of the gradients."""
    hidden, weight, labels = problem()
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    function(hidden, weight, labels, rows, **options)  # what the first call alone makes
    with LiveBytes() as live:
        total = function(hidden, weight, labels, rows, **options)
        if trained:
            total.backward()
    return live.peak, sum(leaf.nbytes for leaf in (hidden, weight) if leaf.grad is not None)


@pytest.mark.parametrize("function", [per_token, per_pair])
@pytest.mark.parametrize("trained", [(), ("hidden",), BOTH])
@pytest.mark.parametrize("rows", [6, 16, 8 + 48, N])
def test_memory_is_the_budget_and_a_copy_of_the_hidden_states(small_tiles, function, trained, rows):
    used, gradients = peak(function, trained, rows)
    # 64 bytes a token: log-probs, log-sum-exp, labels, ids, statistics; and the row kernels' chunks, here of one row.
    assert used <= rows * ROW + N * D * 4 + 64 * N + 4 * ROW + gradients
    if rows < N:
        assert used < N * ROW + gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function, rows", [(per_token, 8), (per_token, 8 + 48), (per_token, N), (per_pair, 16)])
def test_a_gradient_that_is_there_already_takes_no_other_beside_it(small_tiles, monkeypatch, function, rows, dtype):
    monkeypatch.setattr(linear_logprobs, "CPU_SLAB", slab := 16)
    hidden, weight, labels = problem()
    hidden, weight = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))
    budget = rows * dtype.itemsize / 4  # of which the functions make bytes of float32
    function(hidden, weight, labels, budget).backward()
    with LiveBytes() as live:
        function(hidden, weight, labels, budget).backward()
    # dweight before it has its factor, or over several tiles: in float32 for as long as it is summed up
    apart = function is per_pair or (dtype == torch.bfloat16 and rows < N)
    rest = rows * V * dtype.itemsize + 2 * N * D * dtype.itemsize + 64 * N + 4 * ROW
    if dtype == torch.bfloat16:  # no mixed products on a CPU: the hidden states are cast, and slabs of the rest
        rest += N * D * 4 + 4 * slab * (N + D) * 4
    assert live.peak <= rest + (weight.numel() * 4 if apart else 0)


def test_memory_is_counted():
    """The count sees the logits of the plain way."""
    hidden, weight, labels = problem()
    with LiveBytes() as live:
        torch.log_softmax(hidden @ weight.T, -1).gather(1, labels[:, None])
    assert live.peak >= 2 * N * ROW


@pytest.mark.gpu
def test_memory_on_a_gpu():
    n, d, v = 2048, 512, 32000
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(v, (n,), device="cuda")
    for rows in (256, n):
        memory_budget = rows * v * 2
        for _ in range(2):  # the first call sets up cuBLAS and Triton
            hidden.grad = weight.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=memory_budget).sum().backward()
            torch.cuda.synchronize()
            used = torch.cuda.max_memory_allocated() - before
        # Over several tiles dweight is summed in float32.
        gradients = hidden.nbytes + weight.nbytes * (1 if rows == n else 3)
        assert used <= memory_budget + 2 * n * d + gradients + 64 * n + (1 << 20)
