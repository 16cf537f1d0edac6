"""What a loss tells besides its value: rewards, log-probs, accuracies, metrics."""

from dataclasses import fields, replace

import loss_oracle
import pytest
import torch
from losses.loss_cases import CASES, DIVERGENCES, PLAIN, Case, drawn

import fastdpo
from fastdpo.losses import REGISTRY
from fastdpo.types import LossOutput

EXACT = {"rtol": 1e-12, "atol": 1e-12}
PAIRED_NAMES = [
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
]  # fmt: skip


def named(**values):
    return {key.replace("_", "/", 1): value for key, value in values.items()}


def rounded(metrics):
    return {name: round(value.item(), 6) for name, value in metrics.items()}


def test_metrics_of_pairs():
    logps = ([-1.0, -2.0, -1.0], [-3.0, -1.5, -1.0], [-2.0, -2.0, -3.0], [-2.0, -2.0, -3.0])
    metrics = fastdpo.preference_loss(*map(torch.tensor, logps), beta=0.5).metrics()
    assert list(metrics) == PAIRED_NAMES
    assert rounded(metrics) == named(
        rewards_chosen=0.5,
        rewards_rejected=round(0.75 / 3, 6),
        rewards_accuracies=round(1 / 3, 6),  # a tie is not right
        rewards_margins=0.25,
        logps_chosen=round(-4 / 3, 6),
        logps_rejected=round(-5.5 / 3, 6),
    )


def test_metrics_of_lists():
    """Chosen is the best, rejected the mean of the others, accuracy the share of twos in the right order."""
    logps = torch.tensor([1.0, 3.0, 2.0, 0.0, 4.0, 1.0])
    refs = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0, 1.0])
    out = fastdpo.listwise_loss(logps, refs, list_sizes=[4, 2], beta=0.5)
    torch.testing.assert_close(out.chosen_logps, torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(out.rejected_logps, torch.tensor([5 / 3, 1.0]))
    torch.testing.assert_close(out.chosen_rewards, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(out.rejected_rewards, torch.tensor([1 / 3, 0.0]))
    # Ratios 1, 2, 0, 0: (1,3) (1,4) (2,3) (2,4) right, (1,2) wrong, (3,4) a tie.
    torch.testing.assert_close(out.accuracies, torch.tensor([4 / 6, 1.0]))
    assert out.metrics().keys() == set(PAIRED_NAMES)
    assert rounded(out.metrics())["rewards/accuracies"] == round(5 / 6, 6)
    assert rounded(out.metrics())["rewards/margins"] == round(1.25 - 1 / 6, 6)


def test_metrics_of_answers():
    logps, refs = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-2.0, -2.0, -2.0, -6.0])
    desirable = torch.tensor([True, False, False, True])
    out = fastdpo.unpaired_loss(logps, refs, desirable=desirable, kl=0.25, beta=0.5)
    nan = torch.nan
    expected = {
        "chosen_logps": [-1.0, nan, nan, -4.0],
        "rejected_logps": [nan, -2.0, -3.0, nan],
        "chosen_rewards": [0.5, nan, nan, 1.0],
        "rejected_rewards": [nan, 0.0, -0.5, nan],
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(out, name), torch.tensor(values), equal_nan=True)
    assert not out.paired and out.accuracies is None
    assert rounded(out.metrics()) == {
        **named(
            rewards_chosen=0.75, rewards_rejected=-0.25, rewards_margins=1.0, logps_chosen=-2.5, logps_rejected=-2.5
        ),
        "kl": 0.25,
    }
    apo = fastdpo.unpaired_loss(logps, refs, desirable=desirable, beta=0.5, loss_type="apo_zero_unpaired")
    assert apo.kl is None and "kl" not in apo.metrics()


@pytest.mark.parametrize("good", [True, False])
def test_metrics_of_answers_of_one_kind(good):
    logps, refs = torch.tensor([-1.0, -2.0]), torch.zeros(2)
    out = fastdpo.unpaired_loss(logps, refs, desirable=torch.tensor([good, good]), kl=0.0)
    there, missing = ("chosen", "rejected") if good else ("rejected", "chosen")
    metrics = out.metrics()
    assert out.loss.isfinite() and metrics[f"logps/{there}"] == -1.5
    assert metrics[f"logps/{missing}"].isnan() and metrics["rewards/margins"].isnan()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewards(case):
    """beta times the score; of means over tokens where the loss is one of means; the scores of a reward model."""
    beta, inputs = 0.3, drawn(case, seed=13)
    out = inputs.call(beta=beta)
    logps = [tensor.detach() for tensor in inputs.logps]
    refs = inputs.refs or [torch.zeros_like(tensor) for tensor in logps]
    kind = case.options.get("f_divergence_type", "reverse_kl")
    alpha = case.options.get("f_alpha_divergence_coef", 0.5)
    if case.names[0] in ("simpo", "orpo"):
        rewards = [beta * tensor / length for tensor, length in zip(logps, inputs.lengths, strict=True)]
    elif case.names[0] == "alphapo":
        own = case.options.get("alphapo_alpha", 0.25)
        means = [tensor / length for tensor, length in zip(logps, inputs.lengths, strict=True)]
        rewards = [beta * loss_oracle.alpha_reward(mean, own) for mean in means]
    elif case.data == "scores":
        rewards = logps
    else:
        rewards = [beta * loss_oracle.score(t - r, kind, alpha) for t, r in zip(logps, refs, strict=True)]
    if case.data == "lists":
        starts = [sum(inputs.sizes[:i]) for i in range(len(inputs.sizes))]
        logps, rewards = (
            [v[0][starts], torch.stack([v[0][s + 1 : s + n].mean() for s, n in zip(starts, inputs.sizes, strict=True)])]
            for v in (logps, rewards)
        )
    elif case.data == "answers":
        logps, rewards = (
            [v[0].where(inputs.desirable, torch.nan), v[0].where(~inputs.desirable, torch.nan)]
            for v in (logps, rewards)
        )
    torch.testing.assert_close([out.chosen_logps, out.rejected_logps], list(logps), equal_nan=True, **EXACT)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close([out.chosen_rewards, out.rejected_rewards], list(rewards), equal_nan=True, **close)


@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_accuracies_of_a_divergence_are_those_of_the_log_ratios(options):
    """A score increases with the log-ratio, and so keeps the order."""
    for name in ("sigmoid", "listwise"):
        inputs = drawn(Case((name,), options), torch.float32, seed=14)
        plain = replace(inputs, case=Case((name,)))
        got, expected = (one.call().metrics()["rewards/accuracies"] for one in (inputs, plain))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_all_but_the_loss_is_detached(case):
    out = drawn(case).call(reduction="none")
    carries = {name.name for name in fields(out) if getattr(getattr(out, name.name), "requires_grad", False)}
    assert carries == {"loss", "losses"}
    assert not any(value.requires_grad for value in out.metrics().values())
    assert all(value.dim() == 0 for value in out.metrics().values())


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_without_a_gradient_all_is_the_same(case):
    inputs = drawn(case)
    with torch.no_grad():
        out = inputs.call()
    assert not out.losses.requires_grad
    torch.testing.assert_close(out.losses, inputs.call().losses.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_inputs_are_left_alone(case):
    inputs = drawn(case)
    before = [tensor.detach().clone() for tensor in (*inputs.logps, *(inputs.refs or ()), *inputs.lengths)]
    inputs.call().loss.backward()
    for tensor, value in zip((*inputs.logps, *(inputs.refs or ()), *inputs.lengths), before, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("names", [("simpo", "sigmoid"), ("sigmoid", "simpo")])
def test_a_mix_has_the_rewards_of_its_first_loss(names):
    inputs = drawn(Case(names), seed=15)
    mean = REGISTRY[names[0]].mean_rewards
    expected = inputs.logps[0] / inputs.lengths[0] if mean else inputs.logps[0] - inputs.refs[0]
    torch.testing.assert_close(inputs.call(beta=0.2).chosen_rewards, 0.2 * expected.detach())


def test_there_and_back():
    """What a wrapped model's forward returns is a dict."""
    out = drawn(Case(("kto",))).call()
    again = LossOutput.from_dict(out.to_dict())
    assert again.metrics().keys() == out.metrics().keys() and again.loss is out.loss and not again.paired
