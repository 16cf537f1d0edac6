"""Log-probs far from ordinary, and in half precision: every value and gradient is a finite number."""

import math
from dataclasses import replace

import pytest
import torch
from losses.loss_cases import CASES, PLAIN, Case, Inputs, drawn

import fastdpo

HALVES = [torch.bfloat16, torch.float16]


def finite(inputs: Inputs, **options):
    out = inputs.call(**options)
    assert out.losses.isfinite().all(), out.losses
    assert out.loss.isfinite().all()
    grads = torch.autograd.grad(out.loss.sum(), inputs.logps, allow_unused=True, materialize_grads=True)
    for grad in grads:
        assert grad.isfinite().all(), grad
    for name in ("chosen_rewards", "rejected_rewards"):
        assert not getattr(out, name).isinf().any(), name
    return out, grads


def with_ratios(case: Case, ratios: list[float], dtype: torch.dtype, lengths: float | None = None) -> Inputs:
    """Every chosen log-ratio with every rejected one; lists of all in many orders; each answer of both kinds."""
    values = torch.tensor(ratios, dtype=dtype)
    if case.data == "lists":
        orders = torch.stack([values, values.flip(0), values.roll(1), values.roll(3)])
        logps, sizes = (torch.cat([orders.flatten(), torch.cartesian_prod(values, values).flatten()]),), None
        sizes = (len(ratios),) * 4 + (2,) * len(ratios) ** 2
    elif case.data == "answers":
        logps, sizes = (values.repeat(2),), None
    else:
        logps, sizes = torch.cartesian_prod(values, values).unbind(1), None
    size = len(logps[0])
    count = len(sizes) if sizes else size
    tokens = torch.full((count,), lengths, dtype=dtype) if lengths else 1 + torch.arange(count, dtype=dtype) % 7
    drawn_ones = drawn(case, dtype, count=2)
    return replace(
        drawn_ones,
        logps=logps,
        refs=tuple(torch.zeros(size, dtype=dtype) for _ in logps) if case.has_reference else None,
        lengths=(tokens, tokens.flip(0)),
        sizes=sizes,
        desirable=torch.arange(size) < len(ratios) if case.data == "answers" else None,
        margins=torch.zeros(size, dtype=dtype) if case.data == "scores" else None,
    ).leaves()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_far_log_ratios(case, dtype):
    """beta * delta of 1e4 and more, where exponentials leave the dtype, just before that, and none at all."""
    for beta in (0.1, 1.0):
        ratios = [-1e5, -1e4 / beta, -711.0, -88.5, -79.0, -40.0, 0.0, 39.0, 79.5, 88.5, 711.0, 1e4 / beta, 1e5]
        finite(with_ratios(case, ratios, dtype), beta=beta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name, far, near", [
    ("sigmoid", [1e4, 0.0, 1.0], 1),
    ("nca_pair", [1.5e4, 0.5, 1.0], 1),
    ("bco_pair", [2e4, 0.0, 1.0], 1),
    ("hinge", [10001.0, 0.0, 1.0], 1),
])  # fmt: skip
def test_far_values_are_right(name, far, near, dtype):
    """Of beta * Delta_c of -1e4, +1e4 and 0 (and the opposite for the rejected): no clamp in the way."""
    ratios = torch.tensor([-1e4, 1e4, 0.0], dtype=dtype)
    zeros = torch.zeros(3, dtype=dtype)
    rejected = -ratios if name == "bco_pair" else zeros
    out = fastdpo.preference_loss(ratios, rejected, zeros, zeros, beta=1.0, loss_type=name)
    at_zero = {"sigmoid": math.log(2), "hinge": 1.0}.get(name, 2 * math.log(2))
    expected = {"sigmoid": [1e4, 0.0, at_zero], "hinge": [10001.0, 0.0, at_zero], "bco_pair": [2e4, 0.0, at_zero]}
    # -logσ(x) - ½ logσ(-x) - ½ logσ(0)
    expected["nca_pair"] = [1e4 + math.log(2) / 2, 5e3 + math.log(2) / 2, at_zero]
    torch.testing.assert_close(out.losses, torch.tensor(expected[name], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if {"orpo", "simpo", "alphapo"} & set(case.names)], ids=str)
@pytest.mark.parametrize("length", [1.0, 300.0])
def test_certain_answers(case, length, dtype):
    """Mean log-probs of 0, a rounding error below and above it, and everything between."""
    tiny = [0.0, -0.0, -1e-45, -1e-38, -1e-12, -1e-7, -1.2e-7, -3e-7, -1e-5, -1e-2, 1e-6, 1e-3, -1e4]
    finite(with_ratios(case, tiny, dtype, length), beta=0.5)


def test_odds_of_ordinary_answers_are_exact_to_the_last_digits():
    """log(1 - e^m) of means near 0 and far from it, in float32."""
    means = torch.tensor([-1e-6, -1e-4, -0.3, -2.0, -30.0], requires_grad=True)
    other = torch.full((5,), -0.7)
    lengths = torch.ones(5)
    out = fastdpo.preference_loss(
        means, other, loss_type="orpo", beta=1.0, chosen_lengths=lengths, rejected_lengths=lengths, reduction="none"
    )
    m = means.detach().double()
    ratio = m - torch.log(-torch.expm1(m)) - (-0.7 - math.log(-math.expm1(-0.7)))
    exact = -m + torch.log1p(torch.exp(-ratio))
    torch.testing.assert_close(out.losses.double(), exact, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("tau", [1e-4, 0.05, 1.0, 5.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_discopop_at_any_temperature(tau, dtype):
    ratios = [sign * size for size in (1e4, 1e3, 90.0, 85.0, 20.0, 1e-3) for sign in (1, -1)]
    finite(with_ratios(Case(("discopop",), {"discopop_tau": tau}), ratios, dtype), beta=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kl", [0.0, 1e4, 1e5])
def test_a_far_reference_point(kl, dtype):
    inputs = replace(with_ratios(Case(("kto",)), [-1e5, -1e4, 0.0, 1e4, 1e5], dtype), kl=kl)
    out, _ = finite(inputs, beta=1.0)
    assert bool(((out.losses >= 0) & (out.losses <= 1)).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_is_float32_on_the_rounded_log_probs(case, dtype):
    """Only the gradient is rounded to the leaf's dtype."""
    half = drawn(case, dtype, seed=6)
    single = replace(
        half,
        logps=tuple(tensor.detach().float() for tensor in half.logps),
        refs=half.refs and tuple(tensor.float() for tensor in half.refs),
        lengths=tuple(tensor.float() for tensor in half.lengths),
        margins=None if half.margins is None else half.margins.float(),
    ).leaves()
    out, exact = (inputs.call(beta=0.3) for inputs in (half, single))
    for name in ("loss", "losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(getattr(out, name), getattr(exact, name), rtol=0, atol=0, equal_nan=True)
    assert out.losses.dtype == out.chosen_rewards.dtype == torch.float32
    got = torch.autograd.grad(out.loss, half.logps, allow_unused=True, materialize_grads=True)
    true = torch.autograd.grad(exact.loss, single.logps, allow_unused=True, materialize_grads=True)
    for mine, grad in zip(got, true, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_far_log_ratios_in_half_precision(case, dtype):
    """As far as a gradient that the dtype can hold: that of sppo_hard, 2 * Delta, leaves float16 at 32,752."""
    ratios = [-1e4, -1e3, -200.0, -89.0, -40.0, -15.0, -10.5, -5.4, 0.0, 10.5, 15.0, 40.0, 88.0, 1e3, 1e4]
    if case.options.get("center_rewards_coefficient"):
        ratios = ratios[1:-1]
    finite(with_ratios(case, ratios, dtype, 2.0), beta=0.5, reduction="sum")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("beta, weight", [(0.1, 1.0), (2.0, 1.0), (0.5, 3.0)])
def test_divergences_leave_room_for_what_multiplies_them(beta, weight, dtype):
    """Where an exponent is near the end of the dtype, beta and a weight must not lead beyond it."""
    case = Case(("hinge",), {"f_divergence_type": "forward_kl"}, (weight,))
    finite(with_ratios(case, [-200.0, -89.0, -79.5, -10.95, 0.0, 1.0], dtype), beta=beta, reduction="sum")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_certain_answers_in_half_precision(dtype):
    finite(with_ratios(Case(("orpo",)), [0.0, -6e-8, -1e-6, -2e-5, -1e-3, -1.0], dtype, 1.0), beta=0.1, reduction="sum")


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_weights_from_none_to_huge(case):
    if not case.per_pair:
        pytest.skip("compares the pairs of a whole batch")
    for weights in ([0.0] * 6, [1e30, 0, 0, 1e-30, 1, 1], [1e-38] * 6):
        inputs = replace(drawn(case, torch.float32), pair_weights=torch.tensor(weights))
        out, grads = finite(inputs, beta=0.2)
        if not any(weights):
            assert out.loss == 0 and not any(grad.any() for grad in grads)
