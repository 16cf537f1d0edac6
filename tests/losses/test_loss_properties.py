"""What must hold of the losses whatever the numbers: symmetries, limits, equalities between losses, weights."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from drawing import draws
from hypothesis import given
from hypothesis import strategies as st
from losses.loss_cases import CASES, PLAIN, Case, drawn

import fastdpo
from fastdpo.losses import Divergence, PairTerms

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
SEEDS = st.integers(0, 2**16)
BETAS = st.sampled_from([0.01, 0.1, 0.5, 2.0])
EPS = st.sampled_from([0.0, 0.1, 0.3, 0.5])
SHIFTS = st.floats(-30, 30)
DELTA_LOSSES = ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "aot"]
EVERY_PER_PAIR = [case for case in CASES if case.per_pair]


def pairs(seed: int, count: int = 5, **replaced):
    """chosen, rejected and references of each, by name of preference_loss."""
    inputs = drawn(Case(("sigmoid",)), seed=seed, count=count)
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    return dict(zip(names, (*inputs.logps, *inputs.refs), strict=True)) | replaced


def swapped(given_pairs):
    return {
        "chosen_logps": given_pairs["rejected_logps"],
        "rejected_logps": given_pairs["chosen_logps"],
        "ref_chosen_logps": given_pairs["ref_rejected_logps"],
        "ref_rejected_logps": given_pairs["ref_chosen_logps"],
    }


def lengths_of(seed: int, count: int = 5):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randint(1, 40, (2, count), generator=generator).double()
    return {"chosen_lengths": chosen, "rejected_lengths": rejected}


def same(out, other, inputs, others=None, **tolerance):
    """Losses and gradients with respect to what each was given."""
    tolerance = tolerance or CLOSE
    torch.testing.assert_close(out.losses, other.losses, **tolerance)
    got = torch.autograd.grad(out.loss, inputs, retain_graph=True)
    for mine, theirs in zip(got, torch.autograd.grad(other.loss, others or inputs, retain_graph=True), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


# Swapping and shifting


@draws(20)
@given(SEEDS, st.sampled_from(["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]))
def test_swapping_negates_delta(seed, kind):
    values = [tensor.detach() for tensor in pairs(seed).values()]
    divergence = Divergence(kind, 0.3)
    chosen, rejected, ref_chosen, ref_rejected = values
    delta = PairTerms(*values, divergence=divergence).delta
    back = PairTerms(rejected, chosen, ref_rejected, ref_chosen, divergence=divergence).delta
    torch.testing.assert_close(back, -delta, rtol=0, atol=0)


@draws(20)
@given(SEEDS, BETAS, st.sampled_from([0.0, 0.1, 0.5]))
def test_swapping_in_the_loss(seed, beta, eps):
    """-logσ(-x) = -logσ(x) + x, and smoothing by eps is swapping in a share eps of pairs."""
    straight = pairs(seed)
    delta = fastdpo.preference_loss(**straight, beta=1.0)
    delta = delta.chosen_rewards - delta.rejected_rewards
    plain, back = (fastdpo.preference_loss(**way, beta=beta).losses for way in (straight, swapped(straight)))
    torch.testing.assert_close(back, plain + beta * delta, **CLOSE)
    smooth = fastdpo.preference_loss(**straight, beta=beta, label_smoothing=eps).losses
    torch.testing.assert_close(smooth, (1 - eps) * plain + eps * back, **CLOSE)


@draws(10)
@given(SEEDS, BETAS)
def test_half_smoothing_does_not_tell_chosen_from_rejected(seed, beta):
    for name in ("sigmoid", "exo_pair"):
        options = {"loss_type": name, "label_smoothing": 0.5, "beta": beta}
        straight = pairs(seed)
        left, right = (fastdpo.preference_loss(**way, **options).losses for way in (straight, swapped(straight)))
        torch.testing.assert_close(left, right, **CLOSE)


@draws(20)
@given(SEEDS, BETAS, SHIFTS, st.sampled_from(DELTA_LOSSES))
def test_a_constant_on_both_references_changes_nothing(seed, beta, shift, name):
    options = {"loss_type": name, "beta": beta, "label_smoothing": 0.2 if name in ("exo_pair", "robust") else 0.0}
    straight = pairs(seed)
    shifts = shift * torch.arange(1, 6) / 5  # one a pair; aot compares pairs with one another
    moved = {key: value + (shift if name == "aot" else shifts) for key, value in straight.items() if "ref" in key}
    leaves = [straight["chosen_logps"], straight["rejected_logps"]]
    left = fastdpo.preference_loss(**straight, **options)
    same(left, fastdpo.preference_loss(**straight | moved, **options), leaves, rtol=1e-9, atol=1e-10)


@draws(20)
@given(SEEDS, BETAS, SHIFTS)
def test_a_constant_on_a_list_changes_nothing(seed, beta, shift):
    inputs = drawn(Case(("listwise",)), seed=seed, count=4)
    shifts = torch.cat([torch.full((size,), shift * (i - 1.5)).double() for i, size in enumerate(inputs.sizes)])
    moved = replace(inputs, refs=(inputs.refs[0] + shifts,))
    same(inputs.call(beta=beta), moved.call(beta=beta), inputs.logps, rtol=1e-9, atol=1e-10)
    leaf = (inputs.logps[0].detach() - shifts).requires_grad_()
    same(inputs.call(beta=beta), inputs.call(leaf, beta=beta), inputs.logps, [leaf], rtol=1e-9, atol=1e-10)


# Limits


@pytest.mark.parametrize("name", ["sigmoid", "aot", "aot_unpaired"])
@draws(10)
@given(seed=SEEDS)
def test_beta_to_zero(name, seed):
    """The loss goes to log 2 and its gradient, divided by beta, to -1/2 and 1/2."""
    given_pairs, beta = pairs(seed), 1e-9
    out = fastdpo.preference_loss(**given_pairs, beta=beta, loss_type=name, reduction="sum")
    torch.testing.assert_close(out.losses, torch.full_like(out.losses, math.log(2)), rtol=0, atol=1e-7)
    chosen, rejected = torch.autograd.grad(out.loss, [given_pairs["chosen_logps"], given_pairs["rejected_logps"]])
    torch.testing.assert_close(chosen / beta, torch.full_like(chosen, -0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(rejected / beta, torch.full_like(rejected, 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name, options, at_zero",
    [
        ("hinge", {}, 1.0),
        ("exo_pair", {"label_smoothing": 0.5}, 0.0),
        ("nca_pair", {}, 2 * math.log(2)),
        ("robust", {"label_smoothing": 0.2}, math.log(2)),
        ("bco_pair", {}, 2 * math.log(2)),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("discopop", {}, math.log(2) / 2 + 0.5),
        ("dpop", {}, math.log(2)),
        ("sigmoid_norm", {}, math.log(2)),
        ("cpo", {"cpo_alpha": 0.0}, math.log(2)),
        ("simpo", {"simpo_gamma": 0.0}, math.log(2)),
    ],
)
def test_beta_to_zero_of_the_others(name, options, at_zero):
    extra = lengths_of(0) if name in ("sigmoid_norm", "cpo", "simpo") else {}
    out = fastdpo.preference_loss(**pairs(0), **extra, beta=1e-10, loss_type=name, **options)
    torch.testing.assert_close(out.losses, torch.full_like(out.losses, at_zero), rtol=0, atol=1e-6)


def test_beta_to_zero_of_lists_and_answers():
    """log K! of a list of K, and half of each answer's weight."""
    lists, answers = drawn(Case(("listwise",))), drawn(Case(("kto",), {"desirable_weight": 3.0}))
    expected = torch.tensor([math.lgamma(size + 1) for size in lists.sizes]).double()
    torch.testing.assert_close(lists.call(beta=1e-10).losses, expected, rtol=0, atol=1e-6)
    expected = torch.where(answers.desirable, 1.5, 0.5).double()
    torch.testing.assert_close(answers.call(beta=1e-10).losses, expected, rtol=0, atol=1e-6)


def test_robust_and_sigmoid_near_their_ends():
    """The unbiased estimate: (1 - e) robust(x) + e robust(-x) = sigmoid(x), whatever the flips."""
    straight = pairs(3)
    for eps in (0.01, 0.2, 0.49):
        options = {"loss_type": "robust", "label_smoothing": eps, "beta": 0.4}
        left, right = (fastdpo.preference_loss(**way, **options).losses for way in (straight, swapped(straight)))
        plain = fastdpo.preference_loss(**straight, beta=0.4).losses
        torch.testing.assert_close((1 - eps) * left + eps * right, plain, rtol=1e-9, atol=1e-10)


# Minima


@draws(10)
@given(SEEDS, BETAS)
def test_squares_at_their_optimum(seed, beta):
    """ipo and sppo_hard: no loss and no gradient where the difference, the ratios, are what they are drawn to."""
    given_pairs, lengths = pairs(seed), lengths_of(seed)
    refs = {key: value for key, value in given_pairs.items() if "ref" in key}
    rejected = given_pairs["rejected_logps"].detach().requires_grad_()
    ratio = (rejected.detach() - refs["ref_rejected_logps"]) / lengths["rejected_lengths"]
    chosen = refs["ref_chosen_logps"] + lengths["chosen_lengths"] * (ratio + 1 / (2 * beta))
    chosen = chosen.detach().requires_grad_()
    out = fastdpo.preference_loss(chosen, rejected, **refs, **lengths, beta=beta, loss_type="ipo")
    assert out.losses.max() < 1e-18 * (1 + 1 / beta**2)
    for grad in torch.autograd.grad(out.loss, [chosen, rejected]):
        assert grad.abs().max() < 1e-9
    best = [(ref + sign / (2 * beta)).requires_grad_() for ref, sign in zip(refs.values(), (1, -1), strict=True)]
    out = fastdpo.preference_loss(*best, **refs, beta=beta, loss_type="sppo_hard")
    assert out.losses.max() < 1e-18 * (1 + 1 / beta**2)
    for grad in torch.autograd.grad(out.loss, best):
        assert grad.abs().max() < 1e-9


@draws(20)
@given(SEEDS, BETAS, st.sampled_from([1e-3, 0.1, 0.3, 0.5]))
def test_exo_is_a_divergence(seed, beta, eps):
    """Not below 0, and 0 with no gradient where the model's odds are those of the label."""
    options = {"loss_type": "exo_pair", "label_smoothing": eps, "beta": beta}
    assert fastdpo.preference_loss(**pairs(seed), **options).losses.min() >= -1e-12
    odds = torch.full((1,), math.log((1 - eps) / eps) / beta, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    out = fastdpo.preference_loss(odds, zero, zero, zero, **options)
    (grad,) = torch.autograd.grad(out.loss, odds)
    assert abs(out.loss.item()) < 1e-14 and abs(grad.item()) < 1e-12


# Losses that are others


@draws(15)
@given(SEEDS, BETAS, st.sampled_from([{}, {"f_divergence_type": "forward_kl"}, {"f_divergence_type": "js_divergence"}]))
def test_lists_of_two_are_pairs(seed, beta, options):
    """Value, gradient, rewards and accuracies."""
    given_pairs = pairs(seed)
    chosen, rejected, ref_chosen, ref_rejected = given_pairs.values()
    of_pairs = fastdpo.preference_loss(**given_pairs, beta=beta, **options)
    logps, refs = torch.stack([chosen, rejected], 1), torch.stack([ref_chosen, ref_rejected], 1)
    of_lists = fastdpo.listwise_loss(logps, refs, beta=beta, **options)
    same(of_pairs, of_lists, [chosen, rejected])
    for name in ("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(getattr(of_pairs, name), getattr(of_lists, name), **CLOSE)
    assert of_pairs.metrics().keys() == of_lists.metrics().keys()
    for name, value in of_pairs.metrics().items():
        torch.testing.assert_close(value, of_lists.metrics()[name], **CLOSE)


@draws(15)
@given(SEEDS, BETAS, EPS)
def test_losses_that_become_sigmoid(seed, beta, eps):
    given_pairs = pairs(seed)
    leaves = [given_pairs["chosen_logps"], given_pairs["rejected_logps"]]

    def loss(name, chosen=given_pairs, **options):
        return fastdpo.preference_loss(**chosen, beta=beta, loss_type=name, **options)

    sigmoid = loss("sigmoid")
    same(loss("robust", label_smoothing=0.0), sigmoid, leaves)
    same(loss("dpop", dpop_lambda=0.0), sigmoid, leaves)
    same(loss("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0), sigmoid, leaves)
    ones = {"chosen_lengths": torch.ones(5), "rejected_lengths": torch.ones(5)}
    same(loss("sigmoid_norm", **ones), sigmoid, leaves)
    free = loss("sigmoid", {key: given_pairs[key] for key in list(given_pairs)[:2]}, reference_free=True,
                label_smoothing=eps)  # fmt: skip
    same(loss("cpo", cpo_alpha=0.0, label_smoothing=eps, **ones), free, leaves)
    same(loss("simpo", simpo_gamma=0.0, label_smoothing=eps, **ones), free, leaves)
    none = {key: value * 0 for key, value in given_pairs.items() if "ref" in key}
    same(loss("sigmoid", given_pairs | none, label_smoothing=eps), free, leaves)


@draws(10)
@given(SEEDS, BETAS, EPS)
def test_one_pair_sorted_is_one_pair(seed, beta, eps):
    given_pairs = pairs(seed, count=1)
    leaves = [given_pairs["chosen_logps"], given_pairs["rejected_logps"]]
    sigmoid = fastdpo.preference_loss(**given_pairs, beta=beta, label_smoothing=eps)
    for name in ("aot", "aot_unpaired"):
        same(fastdpo.preference_loss(**given_pairs, beta=beta, label_smoothing=eps, loss_type=name), sigmoid, leaves)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@draws(10)
@given(seed=SEEDS)
def test_sorted_losses_take_pairs_in_any_order(name, seed):
    """And aot_unpaired the two sides in orders of their own. Gradients go with their answers."""
    inputs = drawn(Case((name,)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(6, generator=generator)
    other = torch.randperm(6, generator=generator) if name == "aot_unpaired" else order
    moved = [tensor.detach()[o] for tensor, o in zip((*inputs.logps, *inputs.refs), (order, other) * 2, strict=True)]
    leaves = [tensor.requires_grad_() for tensor in moved[:2]]
    out, straight = fastdpo.preference_loss(*moved, loss_type=name), inputs.call()
    torch.testing.assert_close(out.loss, straight.loss, **CLOSE)
    truth = torch.autograd.grad(straight.loss, inputs.logps)
    for mine, exact, places in zip(torch.autograd.grad(out.loss, leaves), truth, (order, other), strict=True):
        torch.testing.assert_close(mine, exact[places], **CLOSE)


@draws(15)
@given(SEEDS, BETAS)
def test_apo_zero_is_the_sum_over_its_two_answers(seed, beta):
    given_pairs = pairs(seed)
    chosen, rejected, ref_chosen, ref_rejected = given_pairs.values()
    paired = fastdpo.preference_loss(**given_pairs, beta=beta, loss_type="apo_zero", reduction="sum")
    answers = fastdpo.unpaired_loss(
        torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected]), desirable=torch.arange(10) < 5,
        beta=beta, loss_type="apo_zero_unpaired", reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(answers.losses.view(2, 5).sum(0), paired.losses, **CLOSE)
    grads = (torch.autograd.grad(out.loss, [chosen, rejected]) for out in (paired, answers))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@draws(15)
@given(SEEDS, BETAS)
def test_relations_of_sums(seed, beta):
    """bco_pair + (half of) what nca_pair adds; sppo_hard in terms of the rewards; bco_pair of K = 1 answers."""
    given_pairs = pairs(seed)

    def losses(name, **options):
        return fastdpo.preference_loss(**given_pairs, beta=beta, loss_type=name, **options).losses

    chosen = given_pairs["chosen_logps"] - given_pairs["ref_chosen_logps"]
    rejected = given_pairs["rejected_logps"] - given_pairs["ref_rejected_logps"]
    zero = torch.zeros_like(chosen)
    alone = fastdpo.preference_loss(chosen, zero, zero, zero, beta=beta).losses
    other = fastdpo.preference_loss(zero, rejected, zero, zero, beta=beta).losses
    torch.testing.assert_close(losses("bco_pair"), alone + other, **CLOSE)
    torch.testing.assert_close(losses("nca_pair"), alone + (alone + beta * chosen) / 2 + other / 2, **CLOSE)
    torch.testing.assert_close(
        beta**2 * losses("sppo_hard"), (beta * chosen - 0.5) ** 2 + (beta * rejected + 0.5) ** 2, **CLOSE
    )
    torch.testing.assert_close(losses("apo_down"), 2 - torch.exp(-alone) - torch.exp(-losses("sigmoid")) +
                               2 * (torch.exp(-alone) - 0.5), **CLOSE)  # fmt: skip


@draws(10)
@given(SEEDS, BETAS)
def test_kto_at_no_divergence_is_apo_zero(seed, beta):
    inputs = replace(drawn(Case(("kto",)), seed=seed), kl=0.0)
    other = replace(inputs, case=Case(("apo_zero_unpaired",)), kl=None)
    same(inputs.call(beta=beta), other.call(beta=beta), inputs.logps)
    below = replace(inputs, kl=-3.0).call(beta=beta)
    same(inputs.call(beta=beta), below, inputs.logps)
    assert below.kl == 0


@draws(10)
@given(SEEDS, SHIFTS)
def test_kl_is_not_below_zero_and_has_no_gradient(seed, shift):
    inputs = drawn(Case(("kto",)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    kl_logps, refs = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    kl_logps, refs = (kl_logps + shift).requires_grad_(), refs.requires_grad_()
    out = inputs.call(kl=None, kl_logps=kl_logps, ref_kl_logps=refs)
    assert out.kl.dim() == 0 and out.kl >= 0 and not out.kl.requires_grad
    torch.testing.assert_close(out.kl, (kl_logps - refs).mean().clamp(min=0).detach(), **CLOSE)
    grads = torch.autograd.grad(out.loss, [*inputs.logps, kl_logps, refs], allow_unused=True)
    assert grads[0].any() and grads[1] is None and grads[2] is None
    number = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(inputs.call(kl=number).loss, [*inputs.logps, number], allow_unused=True)[1] is None


@pytest.mark.parametrize("case", [case for case in PLAIN if case.has_reference], ids=str)
def test_references_get_no_gradient(case):
    inputs = drawn(case)
    refs = tuple(tensor.clone().requires_grad_() for tensor in inputs.refs)
    out = replace(inputs, refs=refs).call()
    grads = torch.autograd.grad(out.loss, [*inputs.logps, *refs], allow_unused=True)
    assert all(grad is None for grad in grads[len(inputs.logps) :])
    assert any(grad is not None and grad.any() for grad in grads[: len(inputs.logps)])


def test_weights_and_margins_get_no_gradient():
    inputs = drawn(Case(("reward",)))
    margins, weights = (torch.ones(6).double().requires_grad_() for _ in range(2))
    out = fastdpo.preference_loss(*inputs.logps, loss_type="reward", margins=margins, pair_weights=weights)
    grads = torch.autograd.grad(out.loss, [*inputs.logps, margins, weights], allow_unused=True)
    assert grads[0].any() and grads[1].any() and grads[2:] == (None, None)


# Weights and reductions


@pytest.mark.parametrize("case", EVERY_PER_PAIR, ids=str)
def test_a_weight_of_zero_removes(case):
    """Values and gradients are those of the batch without it, the token mean of an NLL included."""
    kept, weights = [0, 2, 3, 5], torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    whole = replace(drawn(case, seed=7), pair_weights=weights)
    small = whole.part(kept).leaves()
    out, alone = (inputs.call(beta=0.3) for inputs in (whole, small))
    torch.testing.assert_close(out.loss, alone.loss, **CLOSE)
    torch.testing.assert_close(out.losses[kept], alone.losses, **CLOSE)
    assert not out.losses[[1, 4]].any()
    options = {"allow_unused": True, "materialize_grads": True}
    whole_grads = replace(whole, logps=torch.autograd.grad(out.loss, whole.logps, **options))
    small_grads = torch.autograd.grad(alone.loss, small.logps, **options)
    for mine, exact in zip(whole_grads.part(kept).logps, small_grads, strict=True):
        torch.testing.assert_close(mine, exact, **CLOSE)
    for grad in whole_grads.part([1, 4]).logps:
        assert not grad.any()


@pytest.mark.parametrize("case", [case for case in PLAIN if case.per_pair], ids=str)
def test_groups_in_another_order(case):
    inputs, order = drawn(case, seed=9), [3, 0, 5, 1, 4, 2]
    out, moved = inputs.call(beta=0.3), inputs.part(order).call(beta=0.3)
    for name in ("losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(getattr(out, name)[order], getattr(moved, name), **CLOSE, equal_nan=True)
    torch.testing.assert_close(out.loss, moved.loss, **CLOSE)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.names) > 1], ids=str)
def test_a_mix_is_the_weighted_sum_of_its_losses(case):
    """Every loss of a mix has the options that it honours, and the others leave it alone."""
    inputs, total = drawn(case, seed=11), 0.0
    for name, weight in zip(case.names, case.loss_weights or (1.0,) * len(case.names), strict=True):
        spec = Case((name,)).specs[0]
        options = {key: value for key, value in case.options.items() if key in spec.honours}
        one = replace(inputs, case=Case((name,), options))
        if not one.case.has_reference:
            one = replace(one, refs=None)
        total = (
            total + weight * one.call(beta=0.3, **({} if spec.needs_kl else {"kl": None} if inputs.kl else {})).losses
        )
    torch.testing.assert_close(inputs.call(beta=0.3).losses, total, **CLOSE)


def test_the_token_mean_of_chosen_answers():
    """sft, whatever the lengths: -sum of log-probs / number of tokens; its share of the parts adds up to the whole."""
    inputs = drawn(Case(("sft",)), seed=12)
    truth = -inputs.logps[0].sum() / inputs.lengths[0].sum()
    torch.testing.assert_close(inputs.call().loss, truth, **CLOSE)
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    truth = -(weights * inputs.logps[0]).sum() / (weights * inputs.lengths[0]).sum()
    torch.testing.assert_close(replace(inputs, pair_weights=weights).call().loss, truth, **CLOSE)


@draws(15)
@given(SEEDS, st.integers(2, 5))
def test_the_right_order_is_the_likeliest(seed, size):
    """Over all orders of a list, e^-loss are chances that add up to 1."""
    generator = torch.Generator().manual_seed(seed)
    logps, refs = torch.randn(2, size, generator=generator, dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(size))))
    out = fastdpo.listwise_loss(logps[orders], refs[orders], beta=0.8)
    torch.testing.assert_close(torch.exp(-out.losses).sum().item(), 1.0)
    best = orders[out.losses.argmin()]
    assert (logps - refs)[best].diff().le(0).all()
