"""The head's gradient added straight to `.grad`: when it is, what comes out, and when autograd must have it instead."""

import pytest
import torch
import torch.distributed as dist

import fastdpo
from fastdpo.ops import into_grad, linear_logps, linear_loss

N, D, V = 24, 8, 60
LABELS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.linspace(-1, 2, N)


def problem(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.nn.Parameter((0.5 * torch.randn(V, D, generator=generator)).to(device, dtype))
    return hidden, weight


def per_token(hidden, weight, rows, bias=None):
    budget = rows * V * hidden.element_size()
    logps = fastdpo.linear_token_logps(hidden, weight, LABELS.to(hidden.device), bias=bias, memory_budget=budget)
    return (logps * WEIGHTS.to(logps)).sum()


def per_pair(hidden, weight, rows, bias=None):
    ids = torch.tensor([0, 2, 1, 3]).repeat_interleave(N // 4)
    return fastdpo.linear_loss(
        hidden, weight, LABELS.to(hidden.device), torch.zeros(4, device=hidden.device), bias=bias,
        sequence_ids=ids.to(hidden.device), tokens_per_pair=[N // 2] * 2, beta=0.5,
        memory_budget=rows * V * hidden.element_size(),
    ).loss  # fmt: skip


WAYS = [(per_token, 1000), (per_token, 7), (per_pair, 13), (per_pair, 5)]
ways = pytest.mark.parametrize("function, rows", WAYS)


@pytest.fixture
def added(monkeypatch):
    """For each backward that asked: whether it adds to `.grad` itself."""
    answers = []

    def spy(ctx, index):
        answers.append(into_grad.grad_to_add_to(ctx, index))
        return answers[-1]

    monkeypatch.setattr(linear_logps, "grad_to_add_to", spy)
    monkeypatch.setattr(linear_loss, "grad_to_add_to", spy)
    return answers


def by_autograd(function, rows, hidden, weight):
    return torch.autograd.grad(function(hidden, weight, rows), weight)[0]


@ways
def test_what_is_added(added, function, rows):
    hidden, weight = problem()
    expected = by_autograd(function, rows, hidden, weight)
    for step in range(1, 4):
        function(hidden, weight, rows).backward()
        torch.testing.assert_close(weight.grad, step * expected)
    assert [each is not None for each in added] == [False, False, True, True]
    assert added[-1] is weight.grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ways
def test_half_precision_is_no_worse_than_autograd(added, function, rows, dtype, device):
    hidden, weight = problem(dtype, device)
    exact = by_autograd(function, rows, *(t.detach().double().requires_grad_() for t in (hidden, weight)))
    one = by_autograd(function, rows, hidden, weight)
    usual = torch.zeros_like(one)
    for _ in range(4):
        function(hidden, weight, rows).backward()
        usual += one
    assert [each is not None for each in added[2:]] == [False, True, True, True]
    ours, theirs = ((grad.double() - 4 * exact).norm() for grad in (weight.grad, usual))
    assert ours <= theirs + torch.finfo(dtype).eps * 4 * exact.norm() / 4


@ways
def test_a_tied_embedding(added, function, rows):
    _, table = problem()
    tokens = torch.arange(N)
    expected = by_autograd(lambda _, w, r: function(w[tokens], w, r), rows, None, table)
    for step in range(1, 3):
        function(table[tokens], table, rows).backward()
        torch.testing.assert_close(table.grad, step * expected)
    assert added[-1] is table.grad


@ways
def test_a_bias_is_left_to_autograd(added, function, rows):
    hidden, weight = problem()
    bias = torch.zeros(V, requires_grad=True)
    expected = torch.autograd.grad(function(hidden, weight, rows, bias), [weight, bias])
    for step in range(1, 3):
        function(hidden, weight, rows, bias).backward()
        for leaf, one in zip((weight, bias), expected, strict=True):
            torch.testing.assert_close(leaf.grad, step * one)
    assert added[-1] is weight.grad


@ways
def test_what_does_not_accumulate_leaves_grad_alone(added, function, rows):
    hidden, weight = problem()
    expected = by_autograd(function, rows, hidden, weight)
    function(hidden, weight, rows).backward()
    before = weight.grad.clone()
    torch.testing.assert_close(by_autograd(function, rows, hidden, weight), expected)
    torch.autograd.grad(function(hidden, weight, rows), [hidden])
    function(hidden, weight, rows).backward(inputs=[hidden])
    assert torch.equal(weight.grad, before)
    assert not any(each is not None for each in added)
    function(hidden, weight, rows).backward(inputs=[weight])
    torch.testing.assert_close(weight.grad, 2 * expected)
    assert added[-1] is weight.grad


HOOKS = {
    "tensor": lambda weight, see: weight.register_hook(see),
    "post-accumulate": lambda weight, see: weight.register_post_accumulate_grad_hook(lambda leaf: see(leaf.grad)),
    "node": lambda weight, see: torch.autograd.graph.get_gradient_edge(weight).node.register_hook(
        lambda _, grads: see(grads[0])
    ),
    "before the node": lambda weight, see: torch.autograd.graph.get_gradient_edge(weight).node.register_prehook(
        lambda grads: see(grads[0])
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
@ways
def test_a_hook_gets_the_gradient(added, function, rows, hook):
    hidden, weight = problem()
    expected = by_autograd(function, rows, hidden, weight)
    weight.grad = torch.ones_like(weight)
    seen = []
    node = torch.autograd.graph.get_gradient_edge(weight).node  # kept, or a hook on it would be forgotten
    handle = HOOKS[hook](weight, lambda grad: seen.append(grad.clone()))
    function(hidden, weight, rows).backward()
    (grad,) = seen
    torch.testing.assert_close(grad, expected + (hook == "post-accumulate"))
    handle.remove()
    function(hidden, weight, rows).backward()
    assert added[-2] is None and added[-1] is weight.grad and node is not None
    torch.testing.assert_close(weight.grad, 1 + 2 * expected)


@ways
def test_other_processes_or_no_leaf(added, monkeypatch, function, rows):
    hidden, weight = problem()
    expected = by_autograd(function, rows, hidden, weight)
    weight.grad = torch.zeros_like(weight)
    function(hidden, weight * 1, rows).backward()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    function(hidden, weight, rows).backward()
    torch.testing.assert_close(weight.grad, 2 * expected)
    assert not any(each is not None for each in added)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_the_gradient(added):
    hidden, weight = problem()
    weight.grad = torch.zeros_like(weight)
    per_token(hidden, weight, 7).backward(create_graph=True)
    assert not added and weight.grad.requires_grad
    weight.grad = None  # a cycle


def test_the_sum_for_the_head_is_no_activation():
    """Hooks for saved tensors may bring those to the host: the (V, D) sum must not be one."""
    hidden, weight = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        loss = per_pair(hidden, weight, 13)
    assert hidden.shape in saved and weight.shape not in saved
    loss.backward()
    torch.testing.assert_close(weight.grad, by_autograd(per_pair, 13, hidden, weight))


def test_a_second_backward_of_a_loss_raises(added):
    hidden, weight = problem()
    weight.grad = torch.zeros_like(weight)
    loss = per_pair(hidden.detach(), weight, 13)
    loss.backward(retain_graph=True)
    assert added[-1] is weight.grad
    with pytest.raises(RuntimeError, match="a backward has had it"):
        loss.backward()
