"""The head's gradient added straight to `.grad`: when it is, what comes out, when autograd must have it instead; and in
the forward already, with `head_grad_scale`."""

import pytest
import torch
import torch.distributed as dist
from counting import LiveBytes

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
both = pytest.mark.parametrize("function, rows", WAYS[1:3])


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


@both
def test_a_tied_embedding(added, function, rows):
    _, table = problem()
    tokens = torch.arange(N)
    expected = by_autograd(lambda _, w, r: function(w[tokens], w, r), rows, None, table)
    for step in range(1, 3):
        function(table[tokens], table, rows).backward()
        torch.testing.assert_close(table.grad, step * expected)
    assert added[-1] is table.grad


@both
def test_a_bias_is_left_to_autograd(added, function, rows):
    hidden, weight = problem()
    bias = torch.zeros(V, requires_grad=True)
    expected = torch.autograd.grad(function(hidden, weight, rows, bias), [weight, bias])
    for step in range(1, 3):
        function(hidden, weight, rows, bias).backward()
        for leaf, one in zip((weight, bias), expected, strict=True):
            torch.testing.assert_close(leaf.grad, step * one)
    assert added[-1] is weight.grad


@both
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
@both
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


@both
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


# On request, before the backward that it is the gradient of


IDS = torch.tensor([0, 2, 1, 3]).repeat_interleave(N // 4)


def ahead(hidden, weight, rows=13, scale=1.0, **options):
    return fastdpo.linear_loss(
        hidden, weight, LABELS, torch.zeros(4), sequence_ids=IDS, tokens_per_pair=[N // 2] * 2, beta=0.5,
        memory_budget=rows * V * hidden.element_size(), head_grad_scale=scale, **options,
    ).loss  # fmt: skip


CASES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weights": {"pair_weights": torch.tensor([1.0, 3.0])},
    "a group larger than the tile": {"rows": 5},
    "all logits kept": {"rows": 1000},
    "a float32 head of bfloat16 states": {"dtype": torch.bfloat16, "head_dtype": torch.float32},
    "bfloat16 products": {"dtype": torch.bfloat16, "exact": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_usual_one(case):
    options = dict(CASES[case])
    dtype, exact = options.pop("dtype", torch.float32), options.pop("exact", True)
    hidden, weight = problem()
    hidden = hidden.detach().to(dtype).requires_grad_()
    bias = torch.zeros(V, requires_grad=True)
    leaves = hidden, weight, bias
    expected = torch.autograd.grad(ahead(*leaves[:2], scale=None, bias=bias, **options), leaves)
    tolerance = {} if exact else {"rtol": 2**-6, "atol": 1e-3}  # scaled before it is rounded, not after
    for step in range(1, 4):
        (ahead(*leaves[:2], scale=0.25, bias=bias, **options) * 0.25).backward()
        for leaf, grad in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, 0.25 * step * grad, **tolerance)


def test_a_tied_embedding_ahead():
    _, table = problem()
    tokens = torch.arange(N)
    (expected,) = torch.autograd.grad(ahead(table[tokens], table, scale=None), table)
    for step in range(1, 3):
        ahead(table[tokens], table).backward()
        torch.testing.assert_close(table.grad, step * expected)


def test_no_sum_beside_grad():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, 300, generator=generator)
    weight = torch.randn(V, 300, generator=generator, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    peaks = []
    for scale in (None, 1.0):
        with LiveBytes() as live:
            ahead(hidden, weight, scale=scale).backward()
        peaks.append(live.peak)
    assert peaks[1] < weight.nbytes <= peaks[0]


def test_a_forward_without_a_backward():
    hidden, weight = problem()
    ahead(hidden, weight)
    with pytest.raises(RuntimeError, match="had no backward"):
        ahead(hidden, weight)
    weight.grad = None
    ahead(hidden, weight).backward()


def test_checkpointing_is_seen():
    hidden, weight = problem()
    out = torch.utils.checkpoint.checkpoint(ahead, hidden, weight, use_reentrant=False)
    with pytest.raises(RuntimeError, match="none may be checkpointed"):
        out.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_loss_runs_twice(reentrant):
    """Its own small backward does not make the checkpoint around it run all again."""
    hidden, weight = problem()
    expected = by_autograd(per_pair, 13, hidden, weight)
    runs = []

    def counted(*arguments):
        runs.append(1)
        return per_pair(*arguments)

    torch.utils.checkpoint.checkpoint(counted, hidden, weight, 13, use_reentrant=reentrant).backward()
    assert len(runs) == 2
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_between_forward_and_backward(to_none):
    hidden, weight = problem()
    optimizer = torch.optim.SGD([weight])
    out = ahead(hidden, weight)
    optimizer.zero_grad(set_to_none=to_none)
    with pytest.raises(RuntimeError, match="call zero_grad before the forward pass"):
        out.backward()


def test_another_gradient_than_announced():
    hidden, weight = problem()
    with pytest.raises(RuntimeError, match=r"would bring 0\.5 for the sum of the losses, and it brings 0\.25"):
        (ahead(hidden, weight, scale=1.0) * 0.5).backward()
    grad = torch.ones(3, 2)
    into_grad._spoil(grad, torch.tensor(False))
    assert (grad == 1).all()
    into_grad._spoil(grad, torch.tensor(True))  # on a GPU, where looking would wait for it
    assert grad[0].isnan().all() and (grad[1:] == 1).all()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_refused(hook):
    hidden, weight = problem()
    node = torch.autograd.graph.get_gradient_edge(weight).node
    HOOKS[hook](weight, lambda grad: None)
    with pytest.raises(ValueError, match="a hook waits for its gradient"):
        ahead(hidden, weight)
    assert weight.grad is None and node is not None


def test_what_is_refused(monkeypatch):
    hidden, weight = problem()
    with pytest.raises(ValueError, match="head_grad_scale is 0"):
        ahead(hidden, weight, scale=0)
    with pytest.raises(ValueError, match=r"this one is torch\.bfloat16"):
        ahead(hidden, weight.bfloat16().detach().requires_grad_())
    with pytest.raises(ValueError, match=r"torch\.float32 and no leaf"):
        ahead(hidden, weight * 1)
    with pytest.raises(ValueError, match="the loss scale that float16 needs"):
        ahead(hidden.half(), weight)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=r"torch\.distributed is initialized"):
        ahead(hidden, weight)
    assert ahead(hidden, weight.detach()).requires_grad  # of a frozen head there is nothing to add
