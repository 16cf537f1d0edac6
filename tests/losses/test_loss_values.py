"""Every loss with every option: values and gradients against the formulas in float64, and gradcheck."""

import loss_oracle
import pytest
import torch
from losses.loss_cases import CASES, DIVERGENCES, PLAIN, Case, Inputs, drawn

import fastdpo
from fastdpo.losses import REGISTRY, Divergence

EXACT = {
    torch.float32: ({"rtol": 1e-5, "atol": 1e-6}, {"rtol": 1e-4, "atol": 1e-6}),
    torch.float64: ({"rtol": 1e-9, "atol": 1e-12}, {"rtol": 1e-9, "atol": 1e-12}),
}


def agree(inputs: Inputs, beta: float, reduction: str, **options):
    """Values and gradients are those of the oracle."""
    values, gradients = EXACT[inputs.logps[0].dtype]
    out = inputs.call(beta=beta, reduction=reduction, **options)
    losses = inputs.truth(beta)
    torch.testing.assert_close(out.losses.double(), loss_oracle.reduced(losses, inputs.pair_weights, "none"), **values)
    loss = loss_oracle.reduced(losses, inputs.pair_weights, reduction)
    torch.testing.assert_close(out.loss.double(), loss, **values)  # of its shape, too
    assert out.loss.dtype == out.losses.dtype == inputs.logps[0].dtype
    upstream = 1 + torch.arange(loss.numel(), dtype=torch.float64).view(loss.shape)  # tells the entries of "none" apart
    got = torch.autograd.grad((upstream * out.loss).sum(), inputs.logps, allow_unused=True, materialize_grads=True)
    true = torch.autograd.grad((upstream * loss).sum(), inputs.logps, allow_unused=True, materialize_grads=True)
    for mine, exact in zip(got, true, strict=True):
        torch.testing.assert_close(mine, exact, **gradients)


def test_the_cases_are_all_losses_and_all_options():
    """What acts on tokens is tested with `fastdpo.loss`."""
    covered = {(case.names[0], option) for case in CASES if len(case.names) == 1 for option in case.options}
    honoured = {(name, option) for name, spec in REGISTRY.items() for option in spec.honours}
    assert {pair for pair in honoured - covered if pair[1] not in ("ld_alpha", "use_weighting")} == set()
    assert {case.names[0] for case in PLAIN} == set(REGISTRY)


@pytest.mark.parametrize("dtype, beta", [(torch.float32, 0.1), (torch.float64, 0.7)], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, beta, dtype):
    agree(drawn(case, dtype, seed=1), beta, "mean")


@pytest.mark.parametrize("case", [case for case in CASES if case.per_pair], ids=str)
def test_weights_and_reductions(case):
    inputs = drawn(case, seed=2)
    weights = torch.tensor([1.0, 0.3, 0.0, 2.5, 1.0, 0.01], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        agree(Inputs(**{**vars(inputs), "pair_weights": weights}), 0.3, reduction)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_reductions_of_whole_batches(name, reduction):
    agree(drawn(Case((name,)), seed=2), 0.3, reduction)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_gradcheck(case):
    """The gradients above are those of the oracle by autograd; these are differences, without any autograd."""
    inputs = drawn(case, seed=3, count=3)
    assert torch.autograd.gradcheck(
        lambda *logps: inputs.call(*logps, beta=0.6, reduction="none").losses, inputs.logps, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("options", [{"f_divergence_type": "reverse_kl"}, *DIVERGENCES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_of_divergences(options, dtype):
    """As functions, from log-ratios of -20 to 20; 0 at 0 and increasing."""
    kind, alpha = options["f_divergence_type"], options.get("f_alpha_divergence_coef", 0.5)
    ratios = torch.linspace(-20, 20, 81, dtype=dtype)
    scores = Divergence(kind, alpha)(ratios)
    truth = loss_oracle.score(ratios.double(), kind, alpha)
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-7)
    assert scores[40] == 0 and bool((scores.diff() >= 0).all())


def test_divergences_that_are_each_other():
    ratios = torch.linspace(-9, 9, 41, dtype=torch.float64)
    same = [(("alpha_divergence", 1.0), ("reverse_kl",)), (("alpha_divergence", 0.0), ("forward_kl",))]
    for left, right in same:
        torch.testing.assert_close(Divergence(*left)(ratios), Divergence(*right)(ratios))
    near = Divergence("alpha_divergence", 1 + 1e-5)(ratios)
    torch.testing.assert_close(near, ratios, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ranks_put_the_best_first(dtype):
    inputs = drawn(Case(("listwise",)), dtype, seed=4)
    generator = torch.Generator().manual_seed(0)
    order, ranks, start = [], [], 0
    for size in inputs.sizes:
        places = torch.randperm(size, generator=generator)
        order += (start + places).tolist()
        ranks += (10 * places - 3).tolist()  # any numbers in the right order
        start += size
    shuffled = [tensor.detach()[order].requires_grad_() for tensor in (*inputs.logps, *inputs.refs)]
    out = fastdpo.listwise_loss(*shuffled, list_sizes=inputs.sizes, ranks=torch.tensor(ranks), beta=0.4)
    straight = inputs.call(beta=0.4)
    for name in ("losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "accuracies"):
        torch.testing.assert_close(getattr(out, name), getattr(straight, name), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(out.loss, shuffled[:1])
    torch.testing.assert_close(grad, torch.autograd.grad(straight.loss, inputs.logps)[0][order])


def test_lists_of_one_size_as_a_matrix():
    generator = torch.Generator().manual_seed(0)
    logps, refs = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    truth = loss_oracle.ranked_losses(logps.flatten(), refs.flatten(), [3] * 4, 0.7)
    torch.testing.assert_close(fastdpo.listwise_loss(logps, refs, beta=0.7).losses, truth)
    flat = fastdpo.listwise_loss(logps.flatten(), refs.flatten(), list_sizes=3, beta=0.7)
    torch.testing.assert_close(flat.losses, truth)
    ranks = torch.tensor([[3, 1, 2]] * 4)
    ranked = fastdpo.listwise_loss(logps[:, [2, 0, 1]], refs[:, [2, 0, 1]], ranks=ranks, beta=0.7)
    torch.testing.assert_close(ranked.losses, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kl_is_the_mean_over_answers_to_other_prompts(dtype):
    """In float32 whatever the log-probs come in."""
    inputs = drawn(Case(("kto",)), torch.float32, seed=5)
    generator = torch.Generator().manual_seed(1)
    kl_logps = (-100 + 20 * torch.randn(7, generator=generator)).to(dtype)
    ref_kl_logps = (-140 + 20 * torch.randn(7, generator=generator)).to(dtype)
    truth = sum(x - y for x, y in zip(kl_logps.tolist(), ref_kl_logps.tolist(), strict=True)) / 7
    assert truth > 1
    out = inputs.call(beta=0.02, kl=None, kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    torch.testing.assert_close(out.kl.item(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.losses, inputs.call(beta=0.02, kl=truth).losses, rtol=1e-5, atol=1e-6)
