"""How much of the logits is held at a time: chosen in one place, once, and kept."""

import pytest
import torch

import fastdpo
from fastdpo.ops import budget
from fastdpo_kernels import linear_logprobs

V, GPU = 128256, torch.device("cuda", 0)
ROWS_4096 = 4096 * V * 2  # bytes in bfloat16


@pytest.fixture
def free(monkeypatch):
    """What is free on a GPU, as a list whose last number is said; nothing has been asked yet."""
    free = [80 << 30]
    monkeypatch.setattr(budget, "_free_at_first", {})
    monkeypatch.setattr(budget, "free_memory", lambda device: free[-1])
    return free


@pytest.mark.parametrize(
    "free, expected",
    [
        (80 << 30, 10 << 30),  # an eighth
        (6 << 30, ROWS_4096),  # an eighth would be fewer rows than run at full speed
        (2 * ROWS_4096, ROWS_4096),
        (1 << 30, 1 << 29),  # half of what is there holds fewer
    ],
)
def test_default_on_a_gpu(free, expected):
    assert budget.default_budget(GPU, free, V, torch.bfloat16) == expected


def test_default_on_a_cpu_does_not_depend_on_what_is_free():
    cpu = torch.device("cpu")
    assert {budget.default_budget(cpu, free, V, torch.float32) for free in (0, 1 << 20, 1 << 40)} == {1 << 26}
    assert budget.resolve_budget(None, cpu, V, torch.float32, training=True) == 1 << 26


def test_tiles_within_a_budget():
    assert budget.plan(10, 49152, torch.float32, 1 << 26, keep=False) == ((1 << 26) // (49152 * 4), 0)
    assert budget.plan(10**6, 100, torch.float32, 1 << 40, keep=False).tile == budget.LARGEST_TILE
    assert budget.plan(10, 1 << 20, torch.float32, 1, keep=True) == (1, 0)
    assert budget.plan(5000, 10, torch.float32, 10 * 4 * 4500, keep=True) == (4096, 404)


def test_the_choice_is_kept(free):
    def choose(training=True, memory_budget=None, vocabulary=V):
        return budget.resolve_budget(memory_budget, GPU, vocabulary, torch.bfloat16, training=training)

    assert choose(training=False) == 10 << 30
    free.append(6 << 30)
    assert choose() == ROWS_4096  # passes with gradients look for themselves: others came before them
    free.append(1 << 30)
    assert choose() == ROWS_4096 and choose(training=False) == 10 << 30
    assert choose(vocabulary=32000) == (6 << 30) // 8
    assert choose(memory_budget=123) == 123


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_choice_is_a_constant_of_a_compiled_graph(free, dynamic):
    def function(x):
        return x * budget.resolve_budget(None, GPU, x.shape[0], torch.bfloat16, training=True)

    free.append(6 << 30)
    torch._dynamo.reset()
    out = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)(torch.ones(1024))
    assert (out == (6 << 30) // 8).all()
    assert list(budget._free_at_first) == [(0, True)]


@pytest.mark.parametrize("function", ["linear_token_logps", "linear_loss"])
def test_an_error_of_memory_says_what_to_do(monkeypatch, function):
    def no_memory(head, rows):
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {rows} rows.")

    hidden, labels = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    weight = torch.randn(100, 4, requires_grad=True)
    options = {"ref_logps": torch.zeros(4), "sequence_ids": torch.tensor([0, 0, 2, 2, 1, 1, 3, 3])}
    monkeypatch.setattr(linear_logprobs.Head, "buffer", no_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory. Tried(.|\n)*smaller memory_budget .* 800, say"):
        getattr(fastdpo, function)(
            hidden, weight, labels, memory_budget=4 * 400, **(options if function == "linear_loss" else {})
        )
