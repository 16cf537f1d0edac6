"""A head in float16 under a loss scale: what the scale is there for is not rounded away before it arrives."""

import pytest
import torch
from tiny import device_for

import fastdpo

D, V, N = 32, 150, 100  # N: tokens of an answer
WAYS = {"groups": 2 * N + 50, "tile": 60, "kept": 10**5, "frozen": 60}  # rows of logits that the budget holds
LARGEST = torch.finfo(torch.float16).max


class Problem:
    """Pairs of answers of N tokens each; `sure`: of tokens that the model is almost certain of."""

    def __init__(self, pairs=3, n=N, sure=False, refs=(), dtype=torch.float16, device="cpu"):
        generator = torch.Generator().manual_seed(n)
        order = torch.stack([torch.arange(pairs), pairs + torch.arange(pairs)], 1).flatten()
        self.ids = order.repeat_interleave(n).to(device)
        self.labels = torch.randint(V, (2 * pairs * n,), generator=generator).to(device)
        # Of sizes as models have them: logits of some 1, of hidden states much larger than the head's weights.
        hidden = 8 * torch.randn(2 * pairs * n, D, generator=generator).to(device)
        self.weight = (0.02 * torch.randn(V, D, generator=generator)).to(device, dtype)
        if sure:
            rows = self.weight[self.labels].float()
            hidden += 22 * rows / rows.square().sum(1, keepdim=True)
        self.hidden = hidden.to(dtype)
        self.bias = (0.1 * torch.randn(V, generator=generator)).to(device, dtype)
        self.refs = torch.tensor(refs or [-5.0 * n] * (2 * pairs), device=device)

    def naive(self, hidden, weight, bias, **options):
        logits = hidden @ weight.T + bias
        wide = torch.promote_types(logits.dtype, torch.float32)
        logps = torch.log_softmax(logits.to(wide), 1).gather(1, self.labels.unsqueeze(1)).squeeze(1)
        sums = torch.zeros_like(self.refs, dtype=wide).index_add(0, self.ids, logps)
        lengths = torch.bincount(self.ids)
        (chosen, rejected), (first, second) = sums.chunk(2), self.refs.to(wide).chunk(2)
        of_chosen, of_rejected = lengths.chunk(2)
        return fastdpo.preference_loss(
            chosen, rejected, first, second, chosen_lengths=of_chosen, rejected_lengths=of_rejected, **options
        ).loss

    def ours(self, way, impl="eager", **options):
        def function(hidden, weight, bias):
            return fastdpo.linear_loss(
                hidden, weight, self.labels, self.refs, bias=bias, sequence_ids=self.ids, impl=impl,
                memory_budget=WAYS[way] * V * hidden.element_size(), **options,
            ).loss  # fmt: skip

        return function

    def gradients(self, function, scale, dtype=None, frozen=False):
        leaves = [each.detach().to(dtype or each.dtype).requires_grad_() for each in self.tensors()]
        if frozen:
            leaves[1:] = [each.detach() for each in leaves[1:]]
        (scale * function(*leaves)).backward()
        return [each.grad.double() / scale for each in leaves if each.grad is not None]

    def tensors(self):
        return self.hidden, self.weight, self.bias


def check(problem, way, scale, impl="eager", **options):
    """Every gradient within twice the naive error, and a little."""

    def naive(*leaves):
        return problem.naive(*leaves, **options)

    exact = problem.gradients(naive, 1.0, torch.float64)
    usual = problem.gradients(naive, scale)
    found = problem.gradients(problem.ours(way, impl, **options), scale, frozen=way == "frozen")
    for ours, theirs, truth in zip(found, usual, exact, strict=False):
        error, allowed = ((each - truth).abs().max() for each in (ours, theirs))
        assert ours.isfinite().all()
        assert error <= 2 * allowed + 2**-12 * truth.abs().max(), (way, error, allowed, truth.abs().max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sure", [False, True])
def test_small_gradients_wait_for_their_scale(way, sure):
    """dL/dlogp is 1.7e-4: sigmoid_norm takes the mean over the tokens of an answer. The scale is as large as may be."""
    check(Problem(sure=sure), way, 2.0**22 if sure else 2.0**16, loss_type="sigmoid_norm", beta=0.1)


@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_tokens(way):
    check(Problem(pairs=1, n=1000), way, 65536.0, loss_type="sigmoid_norm", beta=0.1)


@pytest.mark.parametrize("way", ["groups", "tile"])
def test_without_a_scale_the_head_is_as_exact_as_with_one(way):
    """The gradient of the hidden states is float16 then, and small: of the head's only the last rounding is."""
    problem = Problem()
    without, with_scale = (
        problem.gradients(problem.ours(way, loss_type="sigmoid_norm", beta=0.1), scale)[1:] for scale in (1.0, 65536.0)
    )
    for got, expected in zip(without, with_scale, strict=True):
        assert (got - expected).abs().max() <= 2**-24  # the least step of float16


@pytest.mark.parametrize("way", ["groups", "tile"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_pairs_whose_gradients_are_of_all_sizes(way, order):
    """From 1e-4 to 1e4 a token, in an order that makes the sums shrink, and in one that does not."""
    distances = torch.tensor([5e-5, 5.0, 5e3])[list(order)]
    problem = Problem()
    logps = fastdpo.token_logps(problem.hidden.double() @ problem.weight.double().T + problem.bias, problem.labels)
    exact = torch.zeros(6, dtype=torch.float64).index_add(0, problem.ids, logps)
    # sppo_hard: the gradient of a chosen log-prob is 2 (Delta - 1 / (2 beta)), that of a rejected one 2 (Delta + ...)
    problem.refs = (exact + torch.cat([distances - 5, distances + 5])).float()
    check(problem, way, 2.0**-8, loss_type="sppo_hard", beta=0.1)  # unscaled, the head's would leave float16


@pytest.mark.parametrize("way", ["groups", "tile"])
def test_a_first_chunk_without_a_gradient_tells_nothing_of_the_next(way):
    weights = torch.tensor([0.0, 1e-4, 1.0])
    check(Problem(), way, 65536.0, loss_type="sigmoid_norm", pair_weights=weights)


def test_infinite_gradients_stay_what_they_are():
    problem = Problem()
    problem.refs[0] = 3e38
    for grad in problem.gradients(problem.ours("groups", loss_type="sppo_hard"), 65536.0):
        assert not grad.isfinite().all()  # for the loss scale to go down, as it does on naive gradients


@pytest.mark.device
@pytest.mark.parametrize("way", ["tile", "kept", "frozen"])
def test_in_triton(way):
    problem = Problem(pairs=1, n=40, sure=True, device=device_for("triton"))
    check(problem, way, 2.0**18, impl="triton", loss_type="sigmoid_norm", beta=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_other_dtypes(dtype, way):
    check(Problem(dtype=dtype, sure=True), way, 3.0)
